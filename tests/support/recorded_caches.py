"""The paged caches that runs of a model make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_rpa
from torch_rpa.layer_scales import scale_tensors
from torch_rpa.transformers import model_runner

# Of keys and values, for two layers of two heads, in the ways that scales are given.
# Powers of two, by which what is stored stays exact.
SCALES: dict[str, tuple[Any, Any]] = {
    "one number": (2.0, 8),
    "layers": (torch.tensor([2.0, 0.5]), [8, 4.0]),
    "heads": (torch.tensor([[2.0, 4.0], [8.0, 0.5]]), (torch.tensor([1.0, 16.0]), 2)),
}


def assert_only_scaled(stored: torch.Tensor, unscaled: torch.Tensor, kind: str) -> None:
    """Asserts that a run with scales stored what one without did, but for the scales.

    Args:
        stored: ``[layers, N, 2, Hkv, page, D]``, with scales.
        unscaled: Without.
        kind: Of ``SCALES``.
    """
    factors = []
    for scales in SCALES[kind]:
        found = scale_tensors("scale", scales, [2, 2], "cpu")
        if isinstance(found, list):
            factors.append(torch.stack(found))
        else:
            assert found is not None
            factors.append(torch.full((2, 2), found))
    stored = stored * torch.stack(factors, 1)[:, None, :, :, None, None]
    # Factors that are tensors meet the scores later, which rounds the next layer's.
    bound = 0 if kind == "one number" else 1e-5
    torch.testing.assert_close(stored, unscaled, rtol=bound, atol=bound)
    assert all(part.any() for part in unscaled.unbind(2))


class RecordedCaches:
    """Remembers the caches that are made from now on, until ``monkeypatch`` ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._made: list[list[torch.Tensor]] = []
        empty_kv_caches = model_runner.empty_kv_caches

        def recording(*args, **kwargs):
            self._made.append(empty_kv_caches(*args, **kwargs))
            return self._made[-1]

        monkeypatch.setattr(model_runner, "empty_kv_caches", recording)

    def last(self, *, num_kv_heads: int = 2, head_dim: int = 32) -> torch.Tensor:
        """Returns keys and values of the last run, ``[layers, N, 2, Hkv, page, D]``."""
        caches = self._made[-1]
        return torch.stack(
            [torch_rpa.unpack_kv_cache(c, num_kv_heads, head_dim) for c in caches]
        )
