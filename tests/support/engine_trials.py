"""Small models and requests with which the tests try serving engines of others.

The engines are in environments of their own, and their classes are imported late.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import transformers

PROMPT_LENGTHS = (5, 17, 33, 60, 1, 100)
NUM_NEW_TOKENS = 24
PAGE_SIZE = 16
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WINDOWS = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES = {
    "llama": {"head_dim": 128},
    "qwen3": {"head_dim": 64},
    "gemma3_text": {
        **WINDOWS,
        "head_dim": 96,
        "query_pre_attn_scalar": 96,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        **WINDOWS,
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def make_model(family: str, directory: str) -> transformers.PreTrainedModel:
    """Saves a model with random weights, and returns it."""
    config = transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return model


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, 500, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


def expected_tokens(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What the model itself generates for each prompt alone."""
    return [
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def greedy(num_tokens: int = NUM_NEW_TOKENS) -> Any:
    import vllm

    return vllm.SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
    )


def generate(engine: Any, prompts: list[list[int]]) -> tuple[list[Any], list[int]]:
    """Returns tokens of all prompts, and how many of each were found in the cache."""
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], greedy(), use_tqdm=False
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, [output.num_cached_tokens for output in outputs]


def scheduler_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.scheduler


def runner_of(engine: Any) -> Any:
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def tokens_beside_cancelled(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Cancels every second request after some steps; returns tokens of the others."""
    core = engine.llm_engine
    for index, prompt in enumerate(prompts):
        core.add_request(str(index), {"prompt_token_ids": prompt}, greedy())
    tokens: dict[str, list[int]] = {}
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 6:
            core.abort_request([str(i) for i in range(1, len(prompts), 2)])
    return [tokens.get(str(i), []) for i in range(0, len(prompts), 2)]


def tokens_with_few_pages(
    engine: Any, prompts: list[list[int]]
) -> tuple[list[Any], int]:
    """Returns tokens, and how often a request was taken out for lack of pages."""
    scheduler = scheduler_of(engine)
    schedule, counts = scheduler.schedule, []

    def counted(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        counts.append(len(output.preempted_req_ids or ()))
        return output

    scheduler.schedule = counted
    tokens, _ = generate(engine, prompts)
    scheduler.schedule = schedule
    return tokens, sum(counts)
