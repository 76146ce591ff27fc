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
    """The largest absolute entries of each key head: ``[Hkv]`` for each layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


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
            recorder.start(batch.runner.kv_caches)
            batch.next_logits()
    largest = recorder.largest()
    key, value = (torch.cat(entries).max().item() for entries in largest)
    if not (math.isfinite(key) and math.isfinite(value)):
        raise ValueError(
            "model must have finite keys and values with these prompts, got largest "
            f"ones {key=}, {value=}"
        )
    return largest


class _Recorder:
    """Stands in for the operator, and remembers what it was given."""

    def __init__(self) -> None:
        self._layers: dict[int, int] = {}  # by the identity of their caches
        # Of keys and of values, by layer, where the model is.
        self._largest: tuple[dict[int, torch.Tensor], ...] = ({}, {})

    def start(self, kv_caches: Sequence[torch.Tensor]) -> None:
        """Says whose caches the next calls have."""
        self._layers = {id(cache): layer for layer, cache in enumerate(kv_caches)}

    def largest(self) -> LargestEntries:
        """Waits for the device."""
        return LargestEntries(
            *(
                [found[layer].float().cpu() for layer in sorted(found)]
                for found in self._largest
            )
        )

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
        layer = self._layers[id(kv_cache)]
        for x, found in zip((k, v), self._largest, strict=True):
            heads = torch.where(is_token[:, None, None], x.abs(), 0).transpose(0, 1)
            # Not amax(), which reduces nothing on XLA devices.
            entries = heads.flatten(1).max(dim=1).values
            found[layer] = torch.maximum(found.get(layer, entries), entries)
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
