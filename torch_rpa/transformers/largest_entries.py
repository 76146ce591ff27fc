"""The largest keys and values of a model, as its paged caches would store them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from torch_rpa.transformers.guards import ATTENTION_NAME, attention_of
from torch_rpa.transformers.lockstep import LockstepBatch
from torch_rpa.transformers.wrappers import innermost, refuse_adapters_of_texts

_PAGE_SIZE = 16


class LargestEntries(NamedTuple):
    """The largest absolute entries of all layers."""

    key: float
    value: float


def largest_entries(
    model: PreTrainedModel, prompts: Iterable[Sequence[int] | torch.Tensor]
) -> LargestEntries:
    """Has a model read prompts, one after the other, where it is.

    Keys are those that attention gets, after the rotary embedding.

    Raises:
        ValueError: There is no prompt, one is empty or is something else, the model
            trains, or keys or values are not finite.
        NotImplementedError: The model is not supported with paged caches.
    """
    texts = [_token_ids(prompt, model) for prompt in prompts]
    if not texts:
        raise ValueError("prompts must have at least one, got none")
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    refuse_adapters_of_texts(model)
    recorder = _Recorder()
    with _same_attention_afterwards(model):
        for text in texts:
            batch = LockstepBatch(
                model,
                [text],
                max_new_tokens=1,
                page_size=_PAGE_SIZE,
                num_pages=None,
                max_tokens_per_step=None,
                cache_dtype=None,
                compiles=False,  # a compiled step would not tell the recorder
                attention=recorder,
            )
            batch.next_logits()
    largest = LargestEntries(*(entry.item() for entry in recorder.largest))
    if not all(map(math.isfinite, largest)):
        raise ValueError(
            f"model must have finite keys and values with these prompts, got {largest}"
        )
    return largest


class _Recorder:
    """Stands in for the operator, and remembers what it was given.

    Attributes:
        largest: The largest key and value so far, where the model is.
    """

    def __init__(self) -> None:
        self.largest: list[torch.Tensor] = []

    def __call__(
        self,
        q: torch.Tensor,  # [T, Hq, D]
        k: torch.Tensor,  # [T, Hkv, D]
        v: torch.Tensor,  # [T, Hkv, D]
        kv_cache: torch.Tensor,
        kv_lens: torch.Tensor,
        page_indices: torch.Tensor,
        cu_q_lens: torch.Tensor,  # [2], of the only sequence
        *others: Any,
        **options: Any,
    ) -> torch.Tensor:
        is_token = torch.arange(len(k), device=k.device) < cu_q_lens[1]
        # Not amax(), which reduces nothing on XLA devices.
        entries = [
            torch.where(is_token[:, None, None], x.abs(), 0).max() for x in (k, v)
        ]
        former = self.largest or entries
        self.largest = [
            torch.maximum(*pair) for pair in zip(former, entries, strict=True)
        ]
        return torch.ops.rpa.ragged_paged_attention(
            q, k, v, kv_cache, kv_lens, page_indices, cu_q_lens, *others, **options
        )


@contextmanager
def _same_attention_afterwards(model: PreTrainedModel) -> Iterator[None]:
    former = attention_of(model)
    try:
        yield
    finally:
        if former != ATTENTION_NAME:
            innermost(model).set_attn_implementation(former)


def _token_ids(prompt: Any, model: PreTrainedModel) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    vocabulary = model.config.get_text_config().vocab_size
    if not (
        isinstance(ids, Sequence)
        and ids
        and all(type(token) is int and 0 <= token < vocabulary for token in ids)
    ):
        raise ValueError(
            "prompts must be lists or tensors of one token id or more, from 0 to "
            f"{vocabulary - 1}, got {prompt!r} among them"
        )
    return [*ids]
