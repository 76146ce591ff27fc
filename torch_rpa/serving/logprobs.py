"""Log probabilities of tokens, and of the most likely ones beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from torch_rpa.serving.sampling_params import MAX_LOGPROBS


@dataclasses.dataclass(frozen=True)
class Logprob:
    """How likely a token was, by the logits of the model before any change to them.

    Attributes:
        logprob: The natural logarithm of its probability.
        rank: 1 for the most likely token.
        decoded_token: Its text; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


class LogprobTensors(NamedTuple):
    """Log probabilities at N positions, K of the most likely tokens each."""

    chosen: torch.Tensor  # f32[N]
    ranks: torch.Tensor  # i32[N]
    top: torch.Tensor  # f32[N, K], descending
    top_tokens: torch.Tensor  # i64[N, K]

    def cpu(self) -> LogprobTensors:
        """Waits for the device."""
        return LogprobTensors(*(tensor.cpu() for tensor in self))

    def at(
        self,
        index: int,
        token: int,
        count: int,
        decode: Callable[[int], str] | None = None,
    ) -> dict[int, Logprob]:
        """Returns the token at a position, and the ``count`` most likely ones there.

        Args:
            index: Of the position; the tensors must be on the CPU.
            token: What ``chosen`` and ``ranks`` are about.
            count: At most K.
            decode: Gives the text of a token.
        """
        top = zip(self.top_tokens[index], self.top[index], strict=True)
        found = {
            int(top_token): Logprob(float(logprob), rank)
            for rank, (top_token, logprob) in enumerate(top, 1)
            if rank <= count
        }
        rank = int(self.ranks[index])
        found.setdefault(token, Logprob(float(self.chosen[index]), rank))
        if decode is None:
            return found
        return {
            token: dataclasses.replace(logprob, decoded_token=decode(token))
            for token, logprob in found.items()
        }


Logprobs = Sequence[dict[int, Logprob]]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> LogprobTensors:
    """Computes log probabilities of tokens and of the most likely ones.

    Args:
        logits: ``[N, V]``.
        tokens: i64 ``[N]``; what is less than 0 is no token, and gets anything.
    """
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, tokens.clamp(min=0)[:, None])
    ranks = (logits > chosen).sum(dim=-1, dtype=torch.int32) + 1
    top = logits.topk(min(MAX_LOGPROBS, logits.shape[-1]), dim=-1)
    return LogprobTensors(
        (chosen - total)[:, 0], ranks, top.values - total, top.indices
    )
