"""What test_models.py runs on a compile-only TPU; prints JSON.

python -m tests.support.compile_only_tpu -m tests.torch_tpu.model_cases CASE ...
"""

import functools
import gc
import sys
import weakref
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import torch_rpa
from tests.support.tiny_llama import build_llama
from tests.torch_tpu.sections import run_cases
from tests.transformers import families, routes
from torch_rpa import devices
from torch_rpa.generate.__main__ import main as generate_command
from torch_rpa.serving import Engine, EngineOptions, SamplingParams
from torch_rpa.transformers import (
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
    model_runner,
)
from torch_rpa.transformers.context import num_key_heads

# More than the vector memory of any chip. A smaller cache XLA moves there and back,
# which reads like copies.
CACHE_BYTES = 160 * 2**20
NUM_LAYERS, PAGES, PAGE_SIZE = 2, 10_000, 16
DECODES = 50
# Family, dtype of its cache (None: of the model), other fields of its config.
FAMILIES: dict[str, tuple[str, torch.dtype | None]] = {
    "sinks and windows": ("gpt_oss", None),
    "soft cap, heads of 256, float8": ("gemma2", torch.float8_e4m3fn),
    "windows, int8": ("mistral", torch.int8),
}
PROMPTS = [[7] * 20, [8] * 30, [7] * 20 + [9] * 9, [5]]
PARAMS = [SamplingParams(max_new_tokens=count) for count in (40, 30, 20, 12)]
SAMPLED = [
    SamplingParams(max_new_tokens=count, temperature=0.8, top_k=9, top_p=0.9, seed=1)
    for count in (40, 30, 20, 12)
]


# ---- the model, called directly


def call(function, kv_caches, kv_len: int) -> torch.Tensor:
    """A decode step of four sequences."""
    batch = [[kv_len] * 4, list(range(4 * 8)), list(range(5)), [4, 4, 4]]
    int32 = [torch.tensor(values, dtype=torch.int32).to("tpu") for values in batch]
    with torch.no_grad():
        return function(
            input_ids=torch.ones(1, 8, dtype=torch.int64).to("tpu"),
            position_ids=torch.full((1, 8), kv_len - 1).to("tpu"),
            use_cache=False,
            rpa=RPAContext(kv_caches, RaggedBatch(*int32)),
            logits_to_keep=torch.arange(4).to("tpu"),
        ).logits


@functools.cache
def large_model():
    model = build_llama("rpa", head_dim=128).to(torch.bfloat16).to("tpu")
    kv_caches = empty_kv_caches(
        model, PAGES, PAGE_SIZE, dtype=torch.bfloat16, device="tpu"
    )
    return model, kv_caches


def model_compiled():
    model, kv_caches = large_model()
    function = torch.compile(model, backend="tpu", dynamic=False, fullgraph=True)
    for kv_len in range(1, DECODES + 1):
        logits = call(function, kv_caches, kv_len)
    num_tensors = len([*model.parameters(), *model.buffers()])
    return {"shape": list(logits.shape), "tensors": num_tensors}


def model_eager():
    model, kv_caches = large_model()
    for kv_len in range(1, 4):
        call(model, kv_caches, kv_len)


def measured_scales():
    model = build_llama("rpa").to("tpu")
    return torch_rpa.measure_kv_scales(model, [[5, 6, 7], [8]], dtype=torch.int8)


# ---- generate


@functools.cache
def small_model():
    return routes.build("rpa").to("tpu")


def num_compilations() -> int:
    return devices.num_compilations(torch.device("tpu"))


def generation(route, times: int = 2, **keywords) -> dict[str, Any]:
    """Generates with the same arguments, and counts programs and caches left."""
    made = []
    make = model_runner.empty_kv_caches

    def make_and_watch(*args, **kwargs):
        kv_caches = make(*args, **kwargs)
        made.extend(map(weakref.ref, kv_caches))
        return kv_caches

    model_runner.empty_kv_caches = make_and_watch
    gc.disable()
    try:
        programs, tokens = [], None
        for _ in range(times):
            before = num_compilations()
            tokens = routes_of(route)(
                small_model(), routes.padded(), num_pages=23, **keywords
            )
            programs.append(num_compilations() - before)
        left = sum(ref() is not None for ref in made)
    finally:
        gc.enable()
        model_runner.empty_kv_caches = make
    assert tokens is not None
    return {
        "programs": programs,
        "shape": list(tokens.shape),
        "device": tokens.device.type,
        "made": len(made),
        "left": left,
    }


def routes_of(name: str):
    return getattr(routes, name)


def generate_twice():
    return generation("custom_generate", max_new_tokens=21)


def generate_in_chunks():
    return generation("custom_generate", max_new_tokens=21, max_tokens_per_step=16)


def generate_in_a_block():
    return generation("generate_in_block", max_new_tokens=21)


# ---- serving


class Zeros(nn.Module):
    """What the compile-only TPU computes."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], 258)


def make_engine(device: str, **options) -> tuple[Engine, list]:
    model = build_llama("rpa")
    model.lm_head = Zeros()
    steps: list = []
    options = {"num_pages": 10, **options}
    return (
        Engine(
            model,
            EngineOptions(
                max_num_sequences=4,
                max_tokens_per_step=24,
                max_sequence_length=96,
                page_size=8,
                token_buckets=(8, 24),  # for the CPU too, which would not pad
                device=device,
                **options,
            ),
            on_step=lambda r: steps.append(
                [
                    r.num_tokens,
                    r.num_padded_tokens,
                    r.num_sequences,
                    r.num_decodes,
                    r.num_waiting,
                    r.num_pages_held,
                    r.num_generated,
                ]
            ),
        ),
        steps,
    )


@functools.cache
def tpu_engine():
    return make_engine("tpu")


def warm_up():
    engine, _ = tpu_engine()
    engine.warm_up()
    return [engine.stats.num_compilations, engine.stats.max_compilations]


def serving() -> dict[str, Any]:
    """The same requests on the TPU and on the CPU."""
    found = {}
    for engine, steps in (tpu_engine(), make_engine("cpu")):
        before = engine.stats.num_compilations
        outputs = engine.generate_batch(PROMPTS, PARAMS)
        found[engine._device.type] = {
            "steps": list(steps),
            "tokens": [o.generated_tokens for o in outputs.values()],
            "shared": [o.num_shared_tokens for o in outputs.values()],
            "preemptions": engine.stats.num_preemptions,
            "programs": engine.stats.num_compilations - before,
        }
    return found


def serving_sampled() -> dict[str, Any]:
    engine, steps = tpu_engine()
    before, first = engine.stats.num_compilations, len(steps)
    engine.generate_batch(PROMPTS, SAMPLED)
    return {
        "programs": engine.stats.num_compilations - before,
        "steps": len(steps) - first,
    }


def another_engine() -> int:
    """Programs that a second engine of the same sizes compiles."""
    engine, _ = make_engine("tpu")
    engine.generate_batch(PROMPTS, PARAMS)
    return engine.stats.num_compilations


# ---- features of models


def feature(name: str) -> str:
    """Serves one request; returns the type of a cache, as HLO writes it."""
    family_name, cache_dtype = FAMILIES[name]
    (family,) = (f for f in families.PROVEN if f.name == family_name)
    config = AutoConfig.for_model(
        family.name, **{**families.SMALL, **family.config, "hidden_size": 128}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="rpa").eval()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(pad_token_id=0)
    one_page = empty_kv_caches(
        model, 1, PAGE_SIZE, dtype=cache_dtype or torch.bfloat16, device="cpu"
    )[0]
    engine = Engine(
        model,
        EngineOptions(
            max_num_sequences=4,
            max_tokens_per_step=8,
            max_sequence_length=64,
            page_size=PAGE_SIZE,
            num_pages=CACHE_BYTES // one_page.nbytes,
            cache_dtype=cache_dtype,
            k_scale=0.5,
            # Of layers and heads: tensors in the compiled steps.
            v_scale=[[0.25] * heads for heads in num_key_heads(model)],
            device="tpu",
        ),
    )
    engine.generate_batch([[1, 2, 3]], SamplingParams(max_new_tokens=3))
    kv_cache = engine._runner.kv_caches[0]
    dtype = {torch.bfloat16: "bf16", torch.int8: "s8"}.get(kv_cache.dtype, "f8e4m3fn")
    return f"{dtype}[{','.join(map(str, kv_cache.shape))}]"


# ---- the command, last: it changes how matrices are multiplied


def command():
    """Exit status of the command with its check, which fails: results are zeros."""
    arguments = ["--device", "tpu", "--check", "--max-new-tokens", "4", "--prompt", "a"]
    return generate_command(arguments)


CASES = {
    function.__name__: function
    for function in (
        model_compiled,
        model_eager,
        generate_twice,
        generate_in_chunks,
        generate_in_a_block,
        warm_up,
        serving,
        serving_sampled,
        another_engine,
        measured_scales,  # last: others count what opens the device
    )
}
CASES |= {name: functools.partial(feature, name) for name in FAMILIES}
CASES |= {"command": command}

if __name__ == "__main__":
    run_cases(CASES, sys.argv[1:])
