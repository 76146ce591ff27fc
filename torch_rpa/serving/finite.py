"""Marks tokens that were chosen from logits which mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NO_TOKEN = -1  # the model's logits mean nothing
NONE_LEFT = -2  # the changed ones do, though the model's are fine: all is banned


def marking(
    choose: Callable[..., torch.Tensor], mark: int = NO_TOKEN
) -> Callable[..., torch.Tensor]:
    """Returns a function like ``choose``, whose tokens are ``mark`` in bad rows.

    A row is bad if a logit is NaN, or if the largest is infinite. Minus infinity is
    fine: it stands for a token that cannot come.

    Args:
        choose: From logits ``[S, V]``, and more, to token ids i64 ``[S]``.
        mark: Less than any token id.
    """

    def choose_or_mark(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        # NaN is neither less nor more than anything.
        is_sound = (logits < torch.inf).all(dim=-1) & (logits > -torch.inf).any(dim=-1)
        return torch.where(is_sound, choose(logits, *others), mark)

    return choose_or_mark
