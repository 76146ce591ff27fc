"""What a request asks for: how to choose its tokens and when to stop."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from torch_rpa.checks import LARGEST_INT, check_types

# Fields of a GenerationConfig that would change the tokens and are not supported, with
# the values that change nothing.
_UNSUPPORTED = {
    "assistant_early_exit": (None,),
    "begin_suppress_tokens": (None,),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "sequence_bias": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "watermarking_config": (None,),
}
# What generate() of transformers takes for fields that are not set.
_TOP_K, _MAX_NEW_TOKENS = 50, 20
_NO_MAX_LENGTH = GenerationConfig().max_length  # None or 20, by the release
# Tokens with a bias in one request, and most likely tokens beside a chosen one.
MAX_LOGIT_BIAS, MAX_LOGPROBS = 300, 20
MAX_TEXTS = 16384  # of one prompt
# Other names of fields, and what those fields are if neither is given.
_ALIASES = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
_DEFAULTS: dict[str, Any] = {"max_new_tokens": _MAX_NEW_TOKENS, "stop_strings": ()}
_MIN_TEMPERATURE, _INF = 1e-5, float("inf")  # less would overflow


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """What a text must be like; exactly one of the attributes is given.

    Attributes:
        json: A JSON schema, as a dict or as JSON text.
        regex: A regular expression that the whole text matches.
        choice: Texts, one of which it is.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "structured_outputs must have exactly one of json, regex and choice, "
                f"got {' and '.join(given) or 'none'}"
            )
        for name, kinds, expected in (
            ("json", (dict, str), "a dict or JSON text"),
            ("regex", (str,), "a str"),
            ("choice", (list, tuple), "a list of str"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise ValueError(
                    f"structured_outputs.{name} must be {expected}, got {value!r}"
                )
        if self.choice is not None:
            is_text = [isinstance(text, str) for text in self.choice]
            if not is_text or not all(is_text):
                raise ValueError(
                    "structured_outputs.choice must be one str or more, got "
                    f"{self.choice!r}"
                )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling and stop conditions of one request; greedy by default.

    Penalties, biases and bans change the logits before a token is chosen, greedily or
    not, in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty``,
    ``presence_penalty``, then whatever bans tokens.

    Attributes:
        max_new_tokens: Most tokens to generate. ``max_tokens=`` is another name for it.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among so many most likely tokens; 0 is all.
        top_p: Sample among the most likely tokens that make up this share; 1 is all.
        seed: The same seed gives the same text, whatever else is in the batch. None
            draws one from the engine's.
        eos_token_ids: Each ends the text, and is its last token; one or several. None
            is the model's own, and ``()`` is none.
        stop_sequences: Token ids that end the text, and are its end; one sequence or
            several.
        stop_strings: Text that ends the text; needs the engine's tokenizer. The last
            token is the one that completes it. ``stop=`` is another name for it.
        include_stop_str_in_output: Whether ``GenerationOutput.text`` has the stop
            string at its end.
        min_p: Sample among tokens at least so many times as likely as the most likely
            one; 0 is all.
        n: Texts to generate, at most 16384, which share the pages of the prompt. With a
            seed the second one has ``seed + 1``, and so on.
        repetition_penalty: Divides positive logits of tokens in the prompt or the text,
            and multiplies negative ones; 1 changes nothing.
        presence_penalty: Subtracted from the logits of tokens in the text.
        frequency_penalty: Subtracted as often as the token is in the text.
        min_tokens: Until so many tokens are generated, ``eos_token_ids`` are banned and
            stop conditions have no effect.
        logit_bias: Token id to what is added to its logit, for at most 300 tokens.
        bad_words: Texts that must not be generated, as the tokens that the engine's
            tokenizer makes of them, alone and after a space. Other tokens that spell
            the same text are not banned.
        bad_words_ids: The same as token ids. The last token of one is banned where the
            prompt or the text ends with those before it.
        logprobs: Report log probabilities of the generated tokens, and at each position
            of so many most likely tokens, 0 to 20; None reports none.
        prompt_logprobs: The same for the tokens of the prompt. They are all computed,
            so that none is taken from the prefix cache.
        structured_outputs: What the text must be like, or a dict of that; needs the
            engine's tokenizer and the extra ``structured``.
        max_tokens: Read it as ``max_new_tokens``.
        stop: Read it as ``stop_strings``.
    """

    max_new_tokens: int = _MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    eos_token_ids: Sequence[int] | int | None = None
    stop_sequences: Sequence[Sequence[int]] | Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    min_p: float = 0.0
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    max_tokens: dataclasses.InitVar[int | None] = None
    stop: dataclasses.InitVar[str | Sequence[str] | None] = None

    def __post_init__(
        self, max_tokens: int | None, stop: str | Sequence[str] | None
    ) -> None:
        for alias, value in (("max_tokens", max_tokens), ("stop", stop)):
            if value is None:
                continue
            name = _ALIASES[alias]
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(
                    f"{alias} must be left out beside {name}, got {value!r} and "
                    f"{getattr(self, name)!r}"
                )
            object.__setattr__(self, name, value)
        check_types(self)
        # Lists are fine, and a lone string is one of them.
        structure = _structure(self.structured_outputs)
        for name, value in (
            ("eos_token_ids", _ends(self.eos_token_ids)),
            ("stop_sequences", _sequences("stop_sequences", self.stop_sequences)),
            ("stop_strings", _strings("stop_strings", self.stop_strings)),
            ("bad_words", _strings("bad_words", self.bad_words)),
            ("bad_words_ids", _sequences("bad_words_ids", self.bad_words_ids)),
            ("logit_bias", _bias(self.logit_bias)),
            ("structured_outputs", structure),
        ):
            object.__setattr__(self, name, value)
        bias = list((self.logit_bias or {}).values())
        counts = f"None or 0 to {MAX_LOGPROBS}"
        for name, is_valid, expected in (
            (
                "max_new_tokens",
                1 <= self.max_new_tokens <= LARGEST_INT,
                "at least 1, and below 2**31",
            ),
            (
                "temperature",
                self.temperature == 0 or _MIN_TEMPERATURE <= self.temperature < _INF,
                f"0 or at least {_MIN_TEMPERATURE}, and finite",
            ),
            (
                "top_k",
                0 <= self.top_k <= LARGEST_INT,
                "0 (all) or more, and below 2**31",
            ),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("stop_sequences", all(self.stop_sequences), "one token or more each"),
            ("stop_strings", all(self.stop_strings), "one character or more each"),
            ("n", 1 <= self.n <= MAX_TEXTS, f"at least 1 and at most {MAX_TEXTS}"),
            ("n", self.n == 1 or self.temperature > 0, "1 at temperature 0"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < _INF,
                "more than 0 and finite",
            ),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "from -2 to 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "from -2 to 2"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_new_tokens,
                f"at least 0 and at most max_new_tokens = {self.max_new_tokens}",
            ),
            (
                "logit_bias",
                len(bias) <= MAX_LOGIT_BIAS and all(abs(b) < _INF for b in bias),
                f"finite numbers for at most {MAX_LOGIT_BIAS} tokens",
            ),
            ("bad_words", all(self.bad_words), "one character or more each"),
            ("bad_words_ids", all(self.bad_words_ids), "one token or more each"),
            (
                "structured_outputs",
                structure is None or isinstance(structure, StructuredOutputsParams),
                "StructuredOutputsParams, a dict of its fields or None",
            ),
            ("logprobs", _is_count(self.logprobs), counts),
            ("prompt_logprobs", _is_count(self.prompt_logprobs), counts),
        ):
            if not is_valid:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}"
                )

    def changed(self, **changes: Any) -> SamplingParams:
        """Returns a copy in which attributes differ, by any of their names."""
        for alias, name in _ALIASES.items():
            if alias in changes:
                changes.setdefault(name, _DEFAULTS[name])
        return dataclasses.replace(self, **changes)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on how often tokens were seen."""
        neutral = 1, 0, 0
        return neutral != (
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        )

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.bad_words
            or self.bad_words_ids
            or self.structured_outputs
            or (self.min_tokens and self.eos_token_ids)
        )

    @classmethod
    def from_generation_config(
        cls,
        config: GenerationConfig,
        *,
        num_prompt: int | None = None,
        longest: int | None = None,
        **changes: Any,
    ) -> SamplingParams:
        """Returns what a generation config of transformers asks for.

        Fields that are not set mean what they mean to ``model.generate``.

        Args:
            config: Greedy or sampling.
            num_prompt: Tokens of the prompt, which ``max_length`` counts as well; None
                if they are not known.
            longest: What ``max_length`` is at most.
            changes: Attributes that are to differ.

        Raises:
            ValueError: The prompt is as long as ``max_length``, or longer.
            NotImplementedError: The config asks for what would change the tokens and
                is not supported, such as beams; or for ``max_length``, and the prompt
                is not known.
        """
        unsupported = {
            name: value
            for name, neutral in _UNSUPPORTED.items()
            if (value := getattr(config, name, None)) not in neutral
        }
        if unsupported:
            raise NotImplementedError(
                f"generation_config must leave out {unsupported}: they would change "
                "the tokens and cannot be served; use model.generate(..., "
                "custom_generate=torch_rpa.transformers.generate)"
            )
        ends = end_token_ids(config)
        bad_words = [tuple(word) for word in config.bad_words_ids or ()]
        fields: dict[str, Any] = {
            "eos_token_ids": config.eos_token_id,
            "stop_strings": config.stop_strings or (),
            "bad_words_ids": [
                # As in transformers, no bad word takes the end from a text.
                *(word for word in bad_words if word[0] not in ends or len(word) > 1),
                *((token,) for token in config.suppress_tokens or ()),
            ],
        }
        for name, field in (
            ("repetition_penalty", "repetition_penalty"),
            ("min_new_tokens", "min_tokens"),
            ("num_return_sequences", "n"),
        ):
            value = getattr(config, name)
            if value is not None:
                fields[field] = value
        if config.max_new_tokens is not None:
            fields["max_new_tokens"] = config.max_new_tokens
        elif changes.keys().isdisjoint(("max_new_tokens", "max_tokens")):
            fields |= _rest_of_max_length(config.max_length, num_prompt, longest)
        if config.do_sample:
            for name, default in (
                ("temperature", 1.0),
                ("top_k", _TOP_K),
                ("top_p", 1.0),
                ("min_p", 0.0),
            ):
                value = getattr(config, name)
                fields[name] = default if value is None else value
        for alias, name in _ALIASES.items():
            if alias in changes:
                fields.pop(name, None)
        return cls(**{**fields, **changes})


def _rest_of_max_length(
    max_length: int | None, num_prompt: int | None, longest: int | None
) -> dict[str, int]:
    """Returns the field that says what is left for new tokens, if that is limited."""
    if max_length is None or max_length == _NO_MAX_LENGTH:
        return {}
    if num_prompt is None:
        raise NotImplementedError(
            f"generation_config must set max_new_tokens, got max_length {max_length}, "
            "which depends on the prompt"
        )
    if max_length <= num_prompt:
        raise ValueError(
            f"max_length must be more than the {num_prompt} tokens of the prompt, got "
            f"{max_length}; set max_new_tokens"
        )
    room = min(max_length, longest or max_length) - num_prompt
    return {"max_new_tokens": max(room, 1)}


def _ends(ids: Any) -> tuple[int, ...] | None:
    if ids is None:
        return None
    return _tokens("eos_token_ids", [ids] if isinstance(ids, int) else ids)


def _sequences(name: str, sequences: Any) -> tuple[tuple[int, ...], ...]:
    """Returns sequences of tokens; a lone one is one of them."""
    if not isinstance(sequences, (list, tuple)):
        raise ValueError(f"{name} must be sequences of token ids, got {sequences!r}")
    if sequences and all(isinstance(token, int) for token in sequences):
        sequences = [sequences]
    return tuple(_tokens(name, tokens) for tokens in sequences)


def _strings(name: str, strings: Any) -> tuple[str, ...]:
    strings = (strings,) if isinstance(strings, str) else strings
    if not isinstance(strings, (list, tuple)) or not all(
        isinstance(string, str) for string in strings
    ):
        raise ValueError(f"{name} must be texts, got {strings!r}")
    return tuple(strings)


def _tokens(name: str, tokens: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(token) for token in tokens)
    except TypeError:
        raise ValueError(f"{name} must be token ids, got {tokens!r}") from None


def end_token_ids(config: GenerationConfig) -> tuple[int, ...]:
    """Returns the tokens that end a text of a model, by its generation config."""
    return _ends(config.eos_token_id) or ()


def _bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping) or not all(
        isinstance(value, (int, float)) for value in bias.values()
    ):
        raise ValueError(f"logit_bias must be token ids to numbers, got {bias!r}")
    tokens = _tokens("logit_bias", bias)
    return dict(zip(tokens, map(float, bias.values()), strict=True))


def _structure(wish: Any) -> Any:
    """Returns what a dict of its fields stands for, and anything else as it is."""
    if not isinstance(wish, Mapping):
        return wish
    known = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    if set(wish) - {*known}:
        raise ValueError(
            f"structured_outputs must have fields among {known}, got {list(wish)}"
        )
    return StructuredOutputsParams(**wish)


def _is_count(logprobs: int | None) -> bool:
    return logprobs is None or 0 <= logprobs <= MAX_LOGPROBS
