"""Texts that follow a JSON schema, a regular expression or a list of choices.

The library llguidance knows which tokens may come next. This room turns tokenizers and
requests into what it takes, and its errors into those of this package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from torch_rpa.serving.sampling_params import StructuredOutputsParams

_WORD = 32  # tokens in a word of allowed bits


@runtime_checkable
class ByteTokens(Protocol):
    """A tokenizer that tells the bytes of each of its tokens."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int

    def token_bytes(self, token: int) -> bytes | None:
        """Returns the bytes of a token, None for one that stands for no text."""
        ...


class GrammarFactory:
    """Makes the grammars of requests for one tokenizer.

    The tokenizer is converted when the first grammar is made, which takes about a
    second for a large vocabulary.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_token_ids: Sequence[int]):
        """Keeps what a grammar needs.

        Args:
            tokenizer: Of transformers, a fast one, or one with :class:`ByteTokens`.
            vocabulary: Number of logits, at least the tokens of the tokenizer.
            eos_token_ids: What ends a text, where the grammar lets it end. The
                tokenizer's own also does.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_token_ids = tuple(eos_token_ids)
        self._converted: Any = None

    def grammar(self, params: StructuredOutputsParams) -> TextGrammar:
        """Returns the grammar of a request, before its first token.

        Raises:
            ValueError: llguidance is not installed, the tokenizer is None, or the
                schema or the expression cannot be used.
            NotImplementedError: The tokenizer does not tell the bytes of its tokens.
        """
        llguidance = _import()
        if self._converted is None:
            self._converted = self._convert(llguidance)
        matcher = llguidance.LLMatcher
        makers: dict[str, Callable[[Any], str]] = {
            "json": matcher.grammar_from_json_schema,
            "regex": matcher.grammar_from_regex,
            "choice": lambda texts: matcher.grammar_from_lark(_choices(texts)),
        }
        (name,) = (name for name in makers if getattr(params, name) is not None)
        given, make = getattr(params, name), makers[name]
        try:
            grammar = make(given)
            error = matcher.validate_grammar(grammar, self._converted)
        except ValueError as exception:
            grammar, error = "", str(exception)
        if error and not error.startswith("WARNING"):
            raise ValueError(
                f"structured_outputs.{name} must be one that llguidance can follow, "
                f"got {given!r}: {_reason(error)}"
            )
        # It says what is wrong as well, so it shall not print that too.
        return TextGrammar(
            matcher(self._converted, grammar, log_level=0), self._vocabulary
        )

    def _convert(self, llguidance: Any) -> Any:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise ValueError(
                "tokenizer must be given to the engine for structured_outputs, got None"
            )
        if isinstance(tokenizer, ByteTokens):
            wrapper = _ByteWrapper(tokenizer, self._vocabulary)
            tokenizer = llguidance.TokenizerWrapper(wrapper)
            make, eos = llguidance.LLTokenizer, self._tokenizer.eos_token_id
        elif getattr(tokenizer, "is_fast", False):
            import llguidance.hf  # pyright: ignore[reportMissingImports]

            make, eos = llguidance.hf.from_tokenizer, tokenizer.eos_token_id
        else:
            raise NotImplementedError(
                "structured_outputs needs a fast tokenizer of transformers, or one "
                f"with token_bytes, got {type(tokenizer).__name__}"
            )
        ends = {*self._eos_token_ids, *(() if eos is None else (eos,))}
        if not ends:
            raise ValueError(
                "structured_outputs needs a token that ends a text, got a tokenizer "
                "without eos_token and a model without eos_token_id"
            )
        try:
            return make(tokenizer, n_vocab=self._vocabulary, eos_token=sorted(ends))
        except ValueError as error:
            raise NotImplementedError(
                "structured_outputs needs a tokenizer of which llguidance finds the "
                f"bytes of each token, got {type(self._tokenizer).__name__}: {error}"
            ) from error


class TextGrammar:
    """Which tokens may follow the text of one request."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher = matcher
        self._words = np.zeros(-(-vocabulary // _WORD), np.uint32)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end of the text."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Goes on by a token.

        Raises:
            RuntimeError: The grammar does not allow it, or is too large to follow.
        """
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._check()

    def allowed_words(self) -> np.ndarray:
        """Returns u32 ``[ceil(V / 32)]``: bit t % 32 of word t // 32 is token t."""
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words

    def _check(self) -> None:
        if self._matcher.is_error():
            # After the first line it describes its own state.
            reason = self._matcher.get_error().splitlines()[0]
            raise RuntimeError(f"structured_outputs cannot go on: {reason}")


class _ByteWrapper:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: ByteTokens, vocabulary: int):
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        tokens += [None] * (vocabulary - len(tokens))
        self.special_token_ids = [i for i, token in enumerate(tokens) if token is None]
        names = (b"<%d>" % token for token in range(len(tokens)))
        self.tokens = [
            name if token is None else token
            for name, token in zip(names, tokens, strict=True)
        ]
        self._ids = {token: i for i, token in enumerate(tokens) if token is not None}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._ids[data[i : i + 1]] for i in range(len(data))]


def _reason(error: str) -> str:
    """Returns the line of an error of llguidance that says what is wrong.

    Others quote what was given, and mark the place in a line of their own.
    """
    lines = error.splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0])


def _choices(texts: Sequence[str]) -> str:
    """Returns a grammar in the notation of Lark."""
    choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return f"start: {choices}"


def _import() -> Any:
    try:
        import llguidance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "structured_outputs needs llguidance, which is not installed: install the "
            "extra structured of this package, by pip install 'torch-rpa[structured]' "
            "or, in a checkout, pip install '.[structured]'"
        ) from error
    return llguidance
