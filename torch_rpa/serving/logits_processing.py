"""Changes the logits of a step as its requests ask: penalties, biases, banned tokens.

What depends on the tokens so far is counted on the host, once a token, by
:class:`TokenRules`. A step sends, for each row, the tokens that it treats in a special
way and one bit for each token of the vocabulary that may come next. So one program
serves all parameters, and nothing has to be kept on the device.

The order is that of transformers and vLLM: biases, repetition, presence and frequency,
then what is banned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from torch_rpa.serving.sampling_params import MAX_LOGIT_BIAS, SamplingParams

_NOT_SEEN = -1
_WORD = 32  # tokens in a word of allowed bits


class LogitsInputs(NamedTuple):
    """How to change the logits of each row, padded to S rows and L special tokens."""

    token_ids: torch.Tensor  # i64[S, L], V where padded, else distinct in a row
    # i32[S, L] how often it was generated; 0 if it is only in the prompt, -1 if nowhere
    counts: torch.Tensor
    bias: torch.Tensor  # f32[S, L]
    repetition: torch.Tensor  # f32[S]
    presence: torch.Tensor  # f32[S]
    frequency: torch.Tensor  # f32[S]
    allowed: torch.Tensor  # i32[S, ceil(V / 32)] bit t % 32 of word t // 32 is token t

    def to(self, device: torch.device | str) -> LogitsInputs:
        """Moves every tensor to a device."""
        return LogitsInputs(*(tensor.to(device) for tensor in self))


def process(logits: torch.Tensor, inputs: LogitsInputs) -> torch.Tensor:
    """Returns the logits f32 ``[S, V]`` as the requests want them."""
    vocabulary = logits.shape[-1]
    # The last column is where the padding goes.
    padded = torch.nn.functional.pad(logits.float(), (0, 1))
    special = padded.gather(1, inputs.token_ids) + inputs.bias
    repetition = inputs.repetition[:, None]
    repeated = torch.where(special < 0, special * repetition, special / repetition)
    special = torch.where(inputs.counts >= 0, repeated, special)
    special = special - inputs.frequency[:, None] * inputs.counts.clamp(min=0)
    special = special - inputs.presence[:, None] * (inputs.counts > 0)
    padded = padded.scatter(1, inputs.token_ids, special)
    return torch.where(
        _unpacked(inputs.allowed, vocabulary), padded[:, :vocabulary], -torch.inf
    )


def _unpacked(words: torch.Tensor, count: int) -> torch.Tensor:
    """Returns bool ``[S, count]``, the bits of i32 ``[S, words]``, lowest first."""
    bit = torch.arange(_WORD, dtype=torch.int32, device=words.device)
    bits = words[:, :, None] & (torch.ones_like(bit) << bit)
    return (bits != 0).flatten(1)[:, :count]


class Grammar(Protocol):
    """Says which tokens may follow a text; see :mod:`torch_rpa.serving.structured`."""

    def accept(self, token: int) -> None:
        """Goes on by a token."""
        ...

    def allowed_words(self) -> np.ndarray:
        """Returns u32 ``[ceil(V / 32)]``: one bit for each token that may follow."""
        ...


class TokenRules:
    """What one request wants of its logits, and what depends on its tokens so far."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocabulary: int,
        grammar: Grammar | None = None,
    ):
        """Counts the tokens of the prompt.

        Args:
            params: Penalties, biases and banned tokens.
            prompt: Token ids.
            vocabulary: Number of logits, V.
            grammar: Further bans tokens.
        """
        self.params = params
        ends: Any = params.eos_token_ids or ()  # a tuple by now
        self._ends = [token for token in ends if token < vocabulary]
        self._tokens = list(prompt)
        self._num_prompt = len(prompt)
        self._counts: dict[int, int] = {}
        self._bias = {t: b for t, b in (params.logit_bias or {}).items() if b}
        self._has_penalties = params.has_penalties
        if self._has_penalties:
            self._counts = dict.fromkeys(prompt, 0)
        self._grammar = grammar
        self._always_allowed = np.full(-(-vocabulary // _WORD), 2**32 - 1, np.uint32)
        _ban(self._always_allowed, [w[0] for w in params.bad_words_ids if len(w) == 1])
        self._long_bad_words = [list(w) for w in params.bad_words_ids if len(w) > 1]

    def append(self, token: int) -> None:
        """Counts a generated token."""
        self._tokens.append(token)
        if self._has_penalties:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._grammar is not None:
            self._grammar.accept(token)

    def special_tokens(self) -> dict[int, int]:
        """Returns how often each token that is not treated as usual was generated."""
        unseen = {t: _NOT_SEEN for t in self._bias if t not in self._counts}
        return self._counts | unseen

    def bias(self, token: int) -> float:
        """Returns what is added to the logit of a token."""
        return self._bias.get(token, 0.0)

    def allowed_words(self) -> np.ndarray:
        """Returns u32 ``[ceil(V / 32)]``: one bit for each token that may come next."""
        words = self._always_allowed.copy()
        banned = [
            word[-1]
            for word in self._long_bad_words
            if self._tokens[-len(word) + 1 :] == word[:-1]
        ]
        if len(self._tokens) - self._num_prompt < self.params.min_tokens:
            banned += self._ends
        _ban(words, banned)
        if self._grammar is not None:
            words &= self._grammar.allowed_words()
        return words


def build_logits_inputs(
    rules: Sequence[TokenRules | None],
    *,
    num_rows: int,
    num_special: int,
    vocabulary: int,
) -> LogitsInputs:
    """Builds the tensors of a step on the host.

    Args:
        rules: Of each row; None and further rows keep their logits.
        num_rows: S.
        num_special: L, at least :func:`num_special_tokens`.
        vocabulary: V.
    """
    token_ids = np.full((num_rows, num_special), vocabulary, np.int64)
    counts = np.full((num_rows, num_special), _NOT_SEEN, np.int32)
    bias = np.zeros((num_rows, num_special), np.float32)
    penalties = np.ones((3, num_rows), np.float32)
    penalties[1:] = 0
    allowed = np.full((num_rows, -(-vocabulary // _WORD)), 2**32 - 1, np.uint32)
    for row, rule in enumerate(rules):
        if rule is None:
            continue
        special = rule.special_tokens()
        size = len(special)
        token_ids[row, :size] = list(special)
        counts[row, :size] = list(special.values())
        bias[row, :size] = [rule.bias(token) for token in special]
        params = rule.params
        penalties[:, row] = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        allowed[row] = rule.allowed_words()
    return LogitsInputs(
        torch.from_numpy(token_ids),
        torch.from_numpy(counts),
        torch.from_numpy(bias),
        repetition=torch.from_numpy(penalties[0]),
        presence=torch.from_numpy(penalties[1]),
        frequency=torch.from_numpy(penalties[2]),
        allowed=torch.from_numpy(allowed.view(np.int32)),
    )


def num_special_tokens(vocabulary: int, sequence_length: int) -> int:
    """Returns how many tokens of a sequence may need special treatment."""
    return min(vocabulary, sequence_length + MAX_LOGIT_BIAS)


def _ban(words: np.ndarray, tokens: Sequence[int]) -> None:
    for token in tokens:
        words[token // _WORD] &= np.uint32(~(1 << token % _WORD) & (2**32 - 1))
