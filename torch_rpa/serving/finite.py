"""Marks tokens that were chosen from logits which mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NO_TOKEN = -1


def marking(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns a function like ``choose``, whose tokens are ``NO_TOKEN`` in bad rows.

    A row is bad if a logit is NaN, or if the largest is infinite. Minus infinity is
    fine: it stands for a token that cannot come.

    Args:
        choose: From logits ``[S, V]``, and more, to token ids i64 ``[S]``.
    """

    def choose_or_mark(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        # NaN is neither less nor more than anything.
        is_sound = (logits < torch.inf).all(dim=-1) & (logits > -torch.inf).any(dim=-1)
        return torch.where(is_sound, choose(logits, *others), NO_TOKEN)

    return choose_or_mark
