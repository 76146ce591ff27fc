"""Text of a growing list of tokens, piece by piece."""

from __future__ import annotations

import re
from typing import Any, Protocol

# Part of a character: the rest of its bytes may follow. Tokenizers of transformers
# write a replacement character, the byte tokenizer of this package escapes.
_INCOMPLETE = re.compile(r"(\ufffd|\\x[89a-f][0-9a-f])$")
# What a tokenizer that cleans up spaces may still change, once more text follows: the
# beginnings of " .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've" and " 're".
_UNSETTLED = re.compile(r"( | '| n| n'| 'v| 'r)$")


class Decoder(Protocol):
    """What is needed of a tokenizer; those of transformers fit."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Turns tokens into text as they come, a whole character at a time.

    The pieces add up to what the tokenizer makes of all tokens at once, spaces that it
    cleans up included.

    Attributes:
        text: All text so far.
    """

    def __init__(self, tokenizer: Decoder):
        self.text = ""
        self._tokenizer = tokenizer
        self._cleans_up = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        # Tokens of the last piece, which tell how the next one joins it, and new ones.
        self._context: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """Returns the text that the token completes, often that of the token alone."""
        self._new.append(token)
        piece = self._piece()
        if not piece or _INCOMPLETE.search(piece) or self._is_unsettled():
            return ""
        return self._emit(piece)

    def flush(self) -> str:
        """Returns what is left at the end, though it is part of a character."""
        return self._emit(self._piece())

    def _piece(self) -> str:
        return self._decode(self._context + self._new).removeprefix(
            self._decode(self._context)
        )

    def _is_unsettled(self) -> bool:
        """Whether the end of the text depends on what follows."""
        if not self._cleans_up:
            return False
        tokenizer: Any = self._tokenizer
        raw = tokenizer.decode(
            self._context + self._new,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return _UNSETTLED.search(raw) is not None

    def _emit(self, piece: str) -> str:
        self.text += piece
        self._context, self._new = self._new, []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
