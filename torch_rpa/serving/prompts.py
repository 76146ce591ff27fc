"""Prompts as people have them, to lists of token ids."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# What a tokenizer returns for text beside the ids, and does not change the answer.
_HARMLESS = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length"}


class PromptReader:
    """Turns a prompt into token ids, or says which argument is not one.

    A prompt is a text; a chat, which is a list of messages; what a tokenizer returned,
    of which padding is left out; or token ids: a list, an array or a tensor, of one
    dimension or with a single row.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        pad_token_id: int | None,
        others: Collection[int | None],
    ):
        """Remembers what reading needs.

        Args:
            tokenizer: Needed for texts and chats.
            pad_token_id: What batches of lists are padded with, if that is known.
            others: Tokens that begin or end a text. If padding is one of them, a
                single one at an end of a prompt is taken for that.
        """
        self._tokenizer = tokenizer
        self._pad_token_id = pad_token_id
        self._fewest_padding = 2 if pad_token_id in others else 1

    def read(self, prompt: Any, name: str) -> list[int]:
        """Returns the token ids of one prompt.

        Raises:
            ValueError: It is none; the message names the argument.
            NotImplementedError: It has inputs besides text.
        """
        if isinstance(prompt, str):
            rows = [self._encode(prompt, name)]
        elif _is_chat(prompt):
            rows = [self._apply_chat_template(prompt, name)]
        else:
            rows = self._rows(prompt, name)
        if len(rows) != 1:
            raise ValueError(f"{name} must be one prompt, got {len(rows)} rows")
        if not rows[0]:
            raise ValueError(f"{name} must have at least one token, got none")
        return rows[0]

    def read_all(self, inputs: Any, name: str) -> list[list[int]]:
        """Returns the token ids of each prompt of a batch; a lone prompt is one."""
        if isinstance(inputs, str) or _is_chat(inputs):
            return [self.read(inputs, name)]
        if isinstance(inputs, Mapping) or hasattr(inputs, "tolist"):
            return self._rows(inputs, name, is_batch=True)
        if not isinstance(inputs, Sequence):
            raise ValueError(f"{name} must be a list of prompts, got {inputs!r}")
        if inputs and all(_is_number(item) for item in inputs):
            raise ValueError(
                f"{name} must be a list of prompts, got the numbers of a single one, "
                f"{_shown(inputs)}: put it into a list"
            )
        return [self.read(item, f"{name}[{i}]") for i, item in enumerate(inputs)]

    def _rows(
        self, prompt: Any, name: str, *, is_batch: bool = False
    ) -> list[list[int]]:
        """Returns each row of token ids, without padding if a mask says what it is."""
        mask = None
        if isinstance(prompt, Mapping):
            others = set(prompt) - {"input_ids", "attention_mask"} - _HARMLESS
            if "input_ids" not in prompt:
                raise ValueError(f"{name} must have input_ids, got {sorted(prompt)}")
            if others:
                raise NotImplementedError(
                    f"{name} must be text only, got {sorted(others)} as well; use "
                    "model.generate"
                )
            mask = prompt.get("attention_mask")
            name, prompt = f"{name}['input_ids']", prompt["input_ids"]
        elif is_batch and getattr(prompt, "ndim", 2) != 2:
            raise ValueError(
                f"{name} must have two dimensions, got {prompt.ndim}: a prompt is a row"
            )
        rows = _nested(prompt, name)
        if mask is None:
            for row in rows:
                self._refuse_padding(row, name)
            return rows
        masks = _nested(mask, name.replace("input_ids", "attention_mask"))
        if [len(row) for row in masks] != [len(row) for row in rows]:
            raise ValueError(f"{name} must be of the shape of attention_mask")
        return [_unpadded(*pair, name) for pair in zip(rows, masks, strict=True)]

    def _refuse_padding(self, row: list[int], name: str) -> None:
        count, pad = self._fewest_padding, self._pad_token_id
        if len(row) > count and [pad] * count in (row[:count], row[-count:]):
            raise ValueError(
                f"{name} must be without padding, got token {pad} at an end of "
                f"{_shown(row)}: leave it out, or pass what the tokenizer returned, "
                "with its attention_mask"
            )

    def _encode(self, text: str, name: str) -> list[int]:
        encode = self._of_tokenizer("encode", name, "a text", text)
        # A chat template has written it already.
        begin = getattr(self._tokenizer, "bos_token", None)
        if begin and text.startswith(begin):
            return _ids(encode(text, add_special_tokens=False), name)
        return _ids(encode(text), name)

    def _apply_chat_template(self, chat: Sequence[Any], name: str) -> list[int]:
        for message in chat:
            content = message.get("content")
            parts = content if isinstance(content, list) else []
            kinds = {part.get("type") for part in parts} - {"text"}
            if kinds:
                raise NotImplementedError(
                    f"{name} must be text only, got content of type {sorted(kinds)}; "
                    "use model.generate"
                )
        apply = self._of_tokenizer("apply_chat_template", name, "a chat", chat)
        goes_on = chat[-1].get("role") == "assistant"
        encoding = apply(
            list(chat),
            tokenize=True,
            return_dict=True,
            continue_final_message=goes_on,
            add_generation_prompt=not goes_on,
        )
        return _ids(encoding["input_ids"], name)

    def _of_tokenizer(self, method: str, name: str, kind: str, prompt: Any) -> Any:
        if not hasattr(self._tokenizer, method):
            raise ValueError(
                f"tokenizer must be given to the engine, with {method}, for {kind} as "
                f"{name}, {_shown(prompt)}, got {type(self._tokenizer).__name__}"
            )
        return getattr(self._tokenizer, method)


def _is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(item, Mapping) and "role" in item for item in prompt)
    )


def _is_number(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 0 and hasattr(value, "__index__")


def _nested(values: Any, name: str) -> list[list[int]]:
    """Returns rows of ints; a single row may stand alone."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (Sequence, range)) or isinstance(values, (str, bytes)):
        raise ValueError(
            f"{name} must be a text, a chat, what a tokenizer returned, or token ids, "
            f"got {values!r}"
        )
    if not values or _is_number(values[0]) or not hasattr(values[0], "__len__"):
        return [_ids(values, name)]
    return [_ids(row, name) for row in values]


def _ids(values: Any, name: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    for value in values:
        if isinstance(value, bool) or not _is_number(value):
            raise ValueError(f"{name} must be token ids, which are ints, got {value!r}")
    return [operator.index(value) for value in values]


def _unpadded(row: list[int], mask: list[int], name: str) -> list[int]:
    kept = [index for index, is_kept in enumerate(mask) if is_kept]
    if kept and kept != list(range(kept[0], kept[-1] + 1)):
        raise ValueError(f"{name} must have its padding at an end, got mask {mask}")
    return [row[index] for index in kept]


def _shown(values: Any) -> str:
    """The beginning of it, for a message."""
    text = repr(values)
    return text if len(text) <= 60 else f"{text[:57]}..."
