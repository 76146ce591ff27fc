"""What a request asks for: how to choose its tokens and when to stop."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from torch_rpa.serving.checks import LARGEST_INT, check_types

# Fields of a GenerationConfig that would change the tokens and are not supported, with
# the values that change nothing.
_UNSUPPORTED = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None,),
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
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "watermarking_config": (None,),
}
# What generate() of transformers takes for fields that are not set.
_TOP_K, _MAX_NEW_TOKENS = 50, 20
_MAX_LENGTHS = (None, 20)  # of transformers 5 and 4
_MIN_TEMPERATURE, _INF = 1e-5, float("inf")  # less would overflow


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling and stop conditions of one request; greedy by default.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Sample among so many most likely tokens; 0 is all.
        top_p: Sample among the most likely tokens that make up this share; 1 is all.
        min_p: Sample among tokens at least so many times as likely as the most likely
            one; 0 is all.
        seed: The same seed gives the same text, whatever else is in the batch. None
            draws one from the engine's.
        eos_token_ids: Each ends the text, and is its last token; one or several. None
            is the model's own, and ``()`` is none.
        stop_sequences: Token ids that end the text, and are its end; one sequence or
            several.
        stop_strings: Text that ends the text; needs the engine's tokenizer. The last
            token is the one that completes it.
    """

    max_new_tokens: int = _MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    eos_token_ids: Sequence[int] | int | None = None
    stop_sequences: Sequence[Sequence[int]] | Sequence[int] = ()
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_types(self)
        # Lists are fine, and a lone string is one of them.
        for name, value in (
            ("eos_token_ids", _ends(self.eos_token_ids)),
            ("stop_sequences", _sequences("stop_sequences", self.stop_sequences)),
            ("stop_strings", _strings("stop_strings", self.stop_strings)),
        ):
            object.__setattr__(self, name, value)
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
        ):
            if not is_valid:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}"
                )

    @classmethod
    def from_generation_config(
        cls, config: GenerationConfig, **changes: Any
    ) -> SamplingParams:
        """Returns what a generation config of transformers asks for.

        Fields that are not set mean what they mean to ``model.generate``.

        Args:
            config: Greedy or sampling.
            changes: Attributes that are to differ.

        Raises:
            NotImplementedError: The config asks for what would change the tokens and
                is not supported, such as beams or a repetition penalty.
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
        if config.max_new_tokens is None and config.max_length not in _MAX_LENGTHS:
            raise NotImplementedError(
                f"generation_config must set max_new_tokens, got max_length "
                f"{config.max_length}, which depends on the prompt"
            )
        fields: dict[str, Any] = {
            "eos_token_ids": config.eos_token_id,
            "stop_strings": config.stop_strings or (),
        }
        if config.max_new_tokens is not None:
            fields["max_new_tokens"] = config.max_new_tokens
        if config.do_sample:
            for name, default in (
                ("temperature", 1.0),
                ("top_k", _TOP_K),
                ("top_p", 1.0),
                ("min_p", 0.0),
            ):
                value = getattr(config, name)
                fields[name] = default if value is None else value
        return cls(**{**fields, **changes})


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
