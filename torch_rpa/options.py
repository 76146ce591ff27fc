"""The non-tensor parameters of the operator: the one place where they are listed.

The schema fragment below, the fields of :class:`AttentionOptions` and the keyword
arguments of :func:`torch_rpa.ragged_paged_attention` name the same parameters in the
same order; ``tests/torch_rpa/test_options.py`` holds them together.
"""

from __future__ import annotations

import dataclasses
import math

import torch

OPTIONS_SCHEMA = (
    "float sm_scale=1.0, "
    "bool causal=True, "
    "int? sliding_window=None, "
    "float? soft_cap=None, "
    "float? q_scale=None, "
    "float? k_scale=None, "
    "float? v_scale=None, "
    "bool update_kv_cache=True, "
    "int? chunk_prefill_size=None, "
    "ScalarType? out_dtype=None"
)

OUT_DTYPES = (torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Everything about one attention call that is not a tensor.

    All values are static: a new value is a new program on an XLA device.

    Attributes:
        sm_scale: Factor on the scores ``q . k``, usually ``1 / sqrt(head_dim)``.
        causal: Hide the keys after a query's own position.
        sliding_window: Keep only the last ``sliding_window`` positions, the query's own
            included. None keeps all.
        soft_cap: Replace each score ``x`` by ``soft_cap * tanh(x / soft_cap)``.
        q_scale: Quantise ``q`` too, as ``q / q_scale`` in the dtype of the cache.
        k_scale: The cache stores ``key / k_scale``. None is 1.
        v_scale: The cache stores ``value / v_scale``. None is 1.
        update_kv_cache: Write ``k`` and ``v`` to the cache. False reads all keys and
            values from the cache and leaves it alone.
        chunk_prefill_size: Query tokens of each of the sequences ``[i, j)`` of the
            distribution. None treats them like the mixed ones.
        out_dtype: Dtype of the output. None is the dtype of ``q``.
    """

    sm_scale: float = 1.0
    causal: bool = True
    sliding_window: int | None = None
    soft_cap: float | None = None
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    update_kv_cache: bool = True
    chunk_prefill_size: int | None = None
    out_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.sm_scale):
            raise ValueError(f"sm_scale must be finite, got {self.sm_scale}")
        for name in ("sliding_window", "chunk_prefill_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        for name in ("soft_cap", "q_scale", "k_scale", "v_scale"):
            value = getattr(self, name)
            if value is not None and not (value > 0.0 and math.isfinite(value)):
                raise ValueError(
                    f"{name} must be positive and finite or None, got {value}"
                )
        if self.out_dtype is not None and self.out_dtype not in OUT_DTYPES:
            raise ValueError(
                f"out_dtype must be one of {OUT_DTYPES} or None, got {self.out_dtype}"
            )
