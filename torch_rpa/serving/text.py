"""Text of a request: what is to be shown of it, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_rpa.serving.detokenizer import Decoder, Detokenizer


class OutputText:
    """The text of one request as its tokens come.

    Without stop strings nothing is decoded before somebody asks for the text.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop_strings: Sequence[str] = (),
        *,
        keeps_stop_string: bool = False,
    ):
        """Begins an empty text.

        Args:
            tokenizer: Turns tokens into text.
            stop_strings: Each of them ends the text.
            keeps_stop_string: Whether it stays at the end of the text.
        """
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = stop_strings
        self._keeps_stop_string = keeps_stop_string
        self._waiting: list[int] = []
        self._end: int | None = None  # of the text, where a stop string ends it
        self._is_finished = False
        self._num_taken = 0

    def add(self, token: int, *, may_stop: bool = True) -> str | None:
        """Adds a token; returns the stop string that is complete now, or None.

        Args:
            token: What comes next.
            may_stop: Whether a stop string ends the text now.
        """
        self._waiting.append(token)
        if not self._stop_strings:
            return None
        num_before = len(self._detokenizer.text)
        self._decode()
        if not may_stop:
            return None
        text = self._detokenizer.text
        found = []
        for string in self._stop_strings:
            # What was there before does not hold it, or the text would have ended.
            start = text.find(string, max(num_before - len(string) + 1, 0))
            if start >= 0:
                found.append((start, string))
        if not found:
            return None
        start, string = min(found)
        self._end = start + len(string) if self._keeps_stop_string else start
        return string

    def finish(self) -> None:
        """Says that no token follows: what was held back belongs to the text."""
        self._is_finished = True

    def text(self) -> str:
        """Returns the text so far, without what may yet become a stop string."""
        self._decode()
        if self._is_finished:
            self._detokenizer.flush()
        text = self._detokenizer.text
        if self._end is not None:
            return text[: self._end]
        if self._is_finished or self._keeps_stop_string:
            return text
        return text[: len(text) - self._num_held_back(text)]

    def take(self) -> str:
        """Returns what the text has got since this was last called."""
        text = self.text()
        new, self._num_taken = text[self._num_taken :], len(text)
        return new

    def _decode(self) -> None:
        waiting, self._waiting = self._waiting, []
        for token in waiting:
            self._detokenizer.add(token)

    def _num_held_back(self, text: str) -> int:
        """Returns how many last characters begin a stop string."""
        longest = max(map(len, self._stop_strings), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(string.startswith(end) for string in self._stop_strings):
                return size
        return 0


def bad_word_ids(tokenizer: Any, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns the token ids of words, at the beginning of a text and within it.

    As in vLLM: a word is also banned after a space, if that is a matter of its first
    token alone.

    Raises:
        ValueError: The tokenizer is None, or has no tokens for a word.
    """
    if words and tokenizer is None:
        raise ValueError(
            f"tokenizer must be given to the engine for bad_words, got None and {words}"
        )
    found: list[tuple[int, ...]] = []
    for word in words:
        alone, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
            for prefix in ("", " ")
        )
        if not alone:
            raise ValueError(
                "bad_words must be texts with tokens, spaces before them left out, got "
                f"{word!r}; use bad_words_ids"
            )
        found.append(alone)
        if spaced[0] != alone[0] and len(spaced) == len(alone):
            found.append(spaced)
    return found
