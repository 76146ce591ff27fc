"""How a call of ``generate`` keeps keys and values."""

from __future__ import annotations

import dataclasses

import torch

from torch_rpa.checks import LARGEST_INT, check_types
from torch_rpa.layer_scales import LayerScales, scale_numbers


@dataclasses.dataclass(frozen=True)
class PagingOptions:
    """Options of both ways to generate; ``paged_generation`` says what they mean."""

    page_size: int = 16
    num_pages: int | None = None
    max_length: int | None = None
    max_tokens_per_step: int | None = None
    cache_dtype: torch.dtype | None = None
    k_scale: LayerScales | None = None
    v_scale: LayerScales | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("page_size", "num_pages", "max_length", "max_tokens_per_step"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST_INT:
                raise ValueError(
                    f"{name} must be at least 1, and below 2**31, got {value}"
                )
        if not isinstance(self.cache_dtype, torch.dtype | None):
            raise ValueError(
                f"cache_dtype must be a torch.dtype or None, got {self.cache_dtype!r}"
            )
        for name in ("k_scale", "v_scale"):
            object.__setattr__(self, name, scale_numbers(name, getattr(self, name)))
