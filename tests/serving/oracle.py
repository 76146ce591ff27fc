"""What a request alone would generate, from one forward pass with eager attention."""

from collections import Counter
from typing import Any

import torch

from torch_rpa.serving import GenerationOutput, SamplingParams, sampling


def model_logits(eager, output: GenerationOutput) -> torch.Tensor:
    """Returns the logits ``[L, V]`` after each token of the prompt and of the text."""
    with torch.no_grad():
        return eager(
            torch.tensor([output.prompt_ids + output.generated_tokens])
        ).logits[0]


def expected_tokens(
    eager, output: GenerationOutput, params: SamplingParams
) -> list[int]:
    """Returns the tokens that the model chooses after each prefix of the result.

    If they are the generated ones, then so is the text of a loop that computes one
    token at a time: each token follows from those before it.
    """
    num_prompt = len(output.prompt_ids)
    logits = model_logits(eager, output)[num_prompt - 1 : -1]
    rows = [
        changed_logits(row, params, output.prompt_ids, output.generated_tokens[:index])
        for index, row in enumerate(logits)
    ]
    if params.temperature == 0:
        return [int(row.argmax()) for row in rows]
    assert params.seed is not None, "another seed would be drawn in each run"
    seed = params.seed + output.index
    return [
        int(
            sampling.sample(
                row[None],
                sampling.build_sampling_inputs([(params, seed, position)], 1, len(row)),
            )
        )
        for position, row in enumerate(rows, num_prompt)
    ]


def changed_logits(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], text: list[int]
) -> torch.Tensor:
    """Returns the logits ``[V]`` of the next token as a request wants them."""
    logits = logits.clone()
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *text}:
        penalty = params.repetition_penalty
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    for token, count in Counter(text).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    before = prompt + text
    for *beginning, last in params.bad_words_ids:
        if before[len(before) - len(beginning) :] == beginning:
            logits[last] = -torch.inf
    ends: Any = params.eos_token_ids  # a tuple by now
    if len(text) < params.min_tokens:
        logits[list(ends)] = -torch.inf
    structure: Any = params.structured_outputs
    if structure is not None:
        fits = [choice.encode() for choice in structure.choice]
        fits = [choice for choice in fits if choice[: len(text)] == bytes(text)]
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[[choice[len(text)] for choice in fits]] = True
        logits[~allowed] = -torch.inf
    return logits
