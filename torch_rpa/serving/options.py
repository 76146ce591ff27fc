"""Sizes of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from torch_rpa.checks import LARGEST_INT, check_types
from torch_rpa.layer_scales import LayerScales, scale_numbers
from torch_rpa.scheduling.scheduler import pages_for
from torch_rpa.transformers.rotary import unscaled_length
from torch_rpa.transformers.step_inputs import StepShapes

# Longer sequences must be asked for: a page table and a cache have to hold them.
_USUAL_SEQUENCE_LENGTH = 4096
# Tokens of a step are padded to a multiple of this.
_TOKEN_ALIGNMENT = 8
# Each bucket of tokens is so many times the one before.
_BUCKET_RATIO = 4


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Limits and cache of an engine; only ``cache_dtype`` and its scales change tokens.

    Attributes:
        max_num_sequences: Most requests that run at the same time, S.
        max_tokens_per_step: Budget of tokens of a step; longer prompts take several.
        max_sequence_length: Most tokens of a prompt and its text. None is what the
            model knows positions for, and at most 4096.
        page_size: Tokens in a page of the cache; 128 is a good size on a TPU.
        num_pages: Pages in the cache of each layer. None is enough for
            ``max_num_sequences`` of ``max_sequence_length``.
        token_buckets: Sizes that steps are padded to, ascending, the last one at least
            ``max_tokens_per_step``. On any device but the CPU each is compiled. None
            takes ``max_num_sequences`` and multiples by 4 up to
            ``max_tokens_per_step``, and on the CPU pads nothing.
        cache_dtype: What keys and values are stored as; None is the model's dtype.
        k_scale: The cache stores ``key / k_scale``, which int8 needs; None is 1. A
            number for all layers, or a tensor ``[layers]`` or ``[layers, Hkv]``, or a
            sequence of numbers or tensors ``[Hkv]``. See
            ``torch_rpa.measure_kv_scales``. What is kept here is numbers.
        v_scale: The cache stores ``value / v_scale`` likewise.
        prefix_caching: Keep full pages, and share them between requests that begin
            with the same tokens.
        lookahead: Start each step before the tokens of the one before are on the host.
        device: One of :func:`torch_rpa.devices.names`; None is where the model is.
        seed: For requests without a seed of their own.
    """

    max_num_sequences: int = 16
    max_tokens_per_step: int = 256
    max_sequence_length: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    token_buckets: tuple[int, ...] | None = None
    cache_dtype: torch.dtype | None = None
    k_scale: LayerScales | None = None
    v_scale: LayerScales | None = None
    prefix_caching: bool = True
    lookahead: bool = True
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (
            ("max_num_sequences", 1),
            ("max_tokens_per_step", 1),
            ("max_sequence_length", 2),
            ("page_size", 1),
            ("num_pages", 1),
        ):
            self._require(name, _is_from(least), f"at least {least}, and below 2**31")
        self._require("token_buckets", _is_ascending, "positive and ascending ints")
        largest = self.token_buckets[-1] if self.token_buckets else None
        if largest is not None and largest < self.max_tokens_per_step:
            raise ValueError(
                f"token_buckets must end with max_tokens_per_step = "
                f"{self.max_tokens_per_step} or more, got {self.token_buckets}"
            )
        self._require(
            "cache_dtype", lambda value: isinstance(value, torch.dtype), "a torch.dtype"
        )
        for name in ("k_scale", "v_scale"):
            object.__setattr__(self, name, scale_numbers(name, getattr(self, name)))

    def _require(
        self, name: str, is_valid: Callable[[Any], bool], expected: str
    ) -> None:
        value = getattr(self, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")

    def sequence_length(self, config: Any) -> int:
        """Returns the most tokens of a sequence, for a model's text config.

        Raises:
            ValueError: ``max_sequence_length`` is more than the model's positions.
            NotImplementedError: Positions are scaled by the longest sequence of the
                batch, so that requests would change each other's tokens.
        """
        limit = getattr(config, "max_position_embeddings", None)
        usual = min(limit or _USUAL_SEQUENCE_LENGTH, _USUAL_SEQUENCE_LENGTH)
        unscaled = unscaled_length(config)
        if self.max_sequence_length is None:
            return usual if unscaled is None else min(usual, unscaled)
        if limit is not None and self.max_sequence_length > limit:
            raise ValueError(
                f"max_sequence_length must be at most the model's {limit} positions, "
                f"got {self.max_sequence_length}"
            )
        if unscaled is not None and self.max_sequence_length > unscaled:
            raise NotImplementedError(
                f"max_sequence_length must be at most {unscaled} for this model, got "
                f"{self.max_sequence_length}: beyond it transformers scales the "
                "positions of all sequences by the longest one of the step"
            )
        return self.max_sequence_length

    def step_shapes(self, sequence_length: int, *, compiled: bool = True) -> StepShapes:
        """Returns the static sizes of the steps.

        Args:
            sequence_length: Most tokens of a sequence.
            compiled: Whether each number of tokens is a program of its own. Otherwise
                steps are padded only if ``token_buckets`` asks for it.
        """
        default = self._default_buckets() if compiled else ()
        return StepShapes(
            token_buckets=tuple(self.token_buckets or default),
            num_sequences=self.max_num_sequences,
            pages_per_sequence=pages_for(sequence_length, self.page_size),
        )

    def _default_buckets(self) -> tuple[int, ...]:
        sizes = [_aligned(self.max_num_sequences)]
        while sizes[-1] < self.max_tokens_per_step:
            sizes.append(
                min(sizes[-1] * _BUCKET_RATIO, _aligned(self.max_tokens_per_step))
            )
        return tuple(sizes)


def _is_from(least: int) -> Callable[[int], bool]:
    return lambda value: least <= value <= LARGEST_INT


def _is_ascending(buckets: Any) -> bool:
    return (
        isinstance(buckets, (list, tuple))
        and bool(buckets)
        and all(type(size) is int for size in buckets)
        and list(buckets) == sorted(set(buckets))
        and buckets[0] > 0
    )


def _aligned(num_tokens: int) -> int:
    return -(-num_tokens // _TOKEN_ALIGNMENT) * _TOKEN_ALIGNMENT
