"""Prints texts as they grow."""

from __future__ import annotations

from typing import Protocol

from torch_rpa.serving import Detokenizer, RequestUpdate
from torch_rpa.serving.detokenizer import Decoder


class Writer(Protocol):
    """A text stream."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


def printable(text: str) -> str:
    """Returns a text without characters that terminals would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class StreamPrinter:
    """Prints one text as it comes, and several of them line by line.

    Lines of several texts are mixed, each after the number of its text in brackets.
    """

    def __init__(self, tokenizer: Decoder, out: Writer, *, num_texts: int):
        self._tokenizer = tokenizer
        self._out = out
        self._is_alone = num_texts == 1
        self._detokenizers: dict[str, Detokenizer] = {}
        self._lines: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def add(self, request_id: str, prompt: str) -> None:
        """Begins a text with its prompt."""
        self._numbers[request_id] = len(self._numbers)
        self._detokenizers[request_id] = Detokenizer(self._tokenizer)
        self._lines[request_id] = ""
        self._print(request_id, printable(prompt))

    def update(self, update: RequestUpdate) -> None:
        """Prints what is new in a text, as far as its characters are complete."""
        request_id = update.request_id
        detokenizer = self._detokenizers[request_id]
        pieces = [detokenizer.add(token) for token in update.new_tokens]
        if update.is_last:
            pieces.append(detokenizer.flush())
        self._print(request_id, printable("".join(pieces)))
        if update.is_last:
            self._end(request_id)

    def close(self) -> None:
        """Prints what is left of every text that has not ended."""
        for request_id, detokenizer in list(self._detokenizers.items()):
            self._print(request_id, printable(detokenizer.flush()))
            self._end(request_id)
        self._out.flush()

    def _print(self, request_id: str, text: str) -> None:
        if self._is_alone:
            self._out.write(text)
        else:
            *lines, rest = (self._lines[request_id] + text).split("\n")
            self._lines[request_id] = rest
            for line in lines:
                self._print_line(request_id, line)
        self._out.flush()

    def _end(self, request_id: str) -> None:
        rest = self._lines.pop(request_id)
        del self._detokenizers[request_id]
        if self._is_alone:
            self._out.write("\n")
        elif rest:
            self._print_line(request_id, rest)

    def _print_line(self, request_id: str, line: str) -> None:
        self._out.write(f"[{self._numbers[request_id]}] {line}\n")
