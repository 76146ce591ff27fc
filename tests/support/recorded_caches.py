"""The paged caches that runs of a model make."""

from __future__ import annotations

import pytest
import torch

import torch_rpa
from torch_rpa.transformers import model_runner


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
