"""Text to token ids and back; the built-in tokenizer has one token for each byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch_rpa.serving.prompts import PromptReader


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; those of transformers fit."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


class ByteTokenizer:
    """Token ids 0 to 255 are the bytes of UTF-8; two more begin and end a text."""

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the begin token, unless it is unwanted, and the bytes of the text."""
        start = [self.bos_token_id] if add_special_tokens else []
        return [*start, *text.encode("utf-8")]

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

    def token_bytes(self, token: int) -> bytes | None:
        """Returns the byte of a token; None for the begin and end tokens."""
        return bytes([token]) if token < self.bos_token_id else None


class PromptEncoder:
    """Encodes prompts with one begin token, or as the first message of a chat."""

    def __init__(self, tokenizer: Tokenizer, *, as_chat: bool = False):
        """Remembers how to encode.

        Args:
            tokenizer: Of the model.
            as_chat: Each prompt is what a user says, written by the chat template.

        Raises:
            ValueError: There is no chat template.
        """
        if as_chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "--chat needs a tokenizer with a chat template, got "
                f"{type(tokenizer).__name__} without one"
            )
        self._reader = PromptReader(tokenizer, pad_token_id=None, others=())
        self._as_chat = as_chat

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a prompt."""
        message = {"role": "user", "content": text}
        return self._reader.read([message] if self._as_chat else text, "prompt")
