"""Text to token ids and back, one token for each byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; those of transformers fit."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


class ByteTokenizer:
    """Token ids 0 to 255 are the bytes of UTF-8; two more begin and end a text."""

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        """Returns the begin token and the bytes of the text."""
        return [self.bos_token_id, *text.encode("utf-8")]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text; bytes that are no UTF-8 appear as ``\\xff``.

        Args:
            token_ids: Ids below ``vocab_size``.
            skip_special_tokens: Leave out the begin and end tokens, else show them as
                ``<bos>`` and ``<eos>``.
        """
        names = {self.bos_token_id: b"<bos>", self.eos_token_id: b"<eos>"}
        text = bytearray()
        for token in token_ids:
            if token not in names:
                text.append(token)
            elif not skip_special_tokens:
                text += names[token]
        return text.decode("utf-8", errors="backslashreplace")
