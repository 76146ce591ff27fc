"""The same tokens from the model's own ``generate``, and the first difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel


class Difference(NamedTuple):
    """The first generated token that differs; None stands for the end of a text."""

    prompt: int
    position: int  # among the generated tokens
    got: int | None
    expected: int | None

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt}, generated token {self.position}: "
            f"got {self.got}, expected {self.expected}"
        )


@torch.no_grad()
def reference_generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
) -> list[int]:
    """Generates greedily for one prompt with transformers' own loop and cache.

    Args:
        model: On the CPU, with standard (eager) attention. Its generation config is
            replaced, so that no penalty or sampling of its own takes part.
        prompt: Token ids.
        max_new_tokens: Most tokens to generate.
        eos_token_ids: Tokens that end a text.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(
            "model must have eager attention, got "
            f"{model.config._attn_implementation!r}"
        )
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=0,
    )
    input_ids = torch.tensor([prompt])
    generate: Callable[..., torch.Tensor] = model.generate  # pyright: ignore[reportAssignmentType]
    tokens = generate(input_ids, attention_mask=torch.ones_like(input_ids))
    return tokens[0, len(prompt) :].tolist()


def first_difference(
    got: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> Difference | None:
    """Returns where two lists of generated tokens first differ, or None."""
    for prompt, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for position in range(max(len(ours), len(theirs))):
            pair = [
                tokens[position] if position < len(tokens) else None
                for tokens in (ours, theirs)
            ]
            if pair[0] != pair[1]:
                return Difference(prompt, position, *pair)
    return None
