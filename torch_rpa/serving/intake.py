"""Reads requests: prompts and parameters in any form, checked, become entries."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from torch_rpa.scheduling import Request
from torch_rpa.serving.entries import Entry
from torch_rpa.serving.logits_processing import TokenRules
from torch_rpa.serving.outputs import GenerationOutput
from torch_rpa.serving.prompts import PromptReader
from torch_rpa.serving.sampling_params import SamplingParams, end_token_ids
from torch_rpa.serving.structured import GrammarFactory
from torch_rpa.serving.text import OutputText, bad_word_ids

Params = SamplingParams | GenerationConfig | Mapping[str, Any] | None


class Intake:
    """What an engine does with a request before it runs.

    Whatever cannot be is a ValueError here that names the argument, so that no step
    has to raise for it.
    """

    def __init__(
        self,
        tokenizer: Any,
        generation_config: GenerationConfig,
        *,
        vocabulary: int,
        longest: int,
        seed: int,
    ):
        """Remembers what requests are read with.

        Args:
            tokenizer: For what is text; None if nothing may be.
            generation_config: The model's own, for requests that do not say.
            vocabulary: Number of logits; token ids are below it.
            longest: Most tokens of a sequence.
            seed: Of the seeds of requests that have none.
        """
        self._tokenizer = tokenizer
        self._generation_config: Any = generation_config
        self._vocabulary = vocabulary
        self._longest = longest
        self._prompts = _prompt_reader(tokenizer, generation_config)
        self._grammars = GrammarFactory(
            tokenizer, vocabulary, end_token_ids(generation_config)
        )
        self._random = random.Random(seed)

    def prompt(self, prompt_ids: Any, name: str) -> list[int]:
        """Returns the token ids of a prompt; ``name`` is what errors call it."""
        return self._prompts.read(prompt_ids, name)

    def prompts(self, inputs: Any, name: str) -> list[list[int]]:
        """Returns the token ids of several prompts."""
        return self._prompts.read_all(inputs, name)

    def params(self, params: Params, num_prompt: int, **changes: Any) -> SamplingParams:
        """Returns what is wished, with the tokens that end a text.

        Args:
            params: As in ``Engine.add_request``.
            num_prompt: Tokens of the prompt.
            changes: Attributes that are to differ.
        """
        model = self._generation_config
        if params is None or isinstance(params, GenerationConfig):
            params = SamplingParams.from_generation_config(
                params or model,
                num_prompt=num_prompt,
                longest=self._longest,
                **changes,
            )
            changes = {}
        elif isinstance(params, Mapping):
            params = _params_of(params)
        if not isinstance(params, SamplingParams):
            raise ValueError(
                "params must be SamplingParams, a dict of its fields, a "
                f"GenerationConfig or None, got {params!r}"
            )
        params = params.changed(**changes)
        if params.eos_token_ids is not None:
            return params
        ends = model.eos_token_id
        return dataclasses.replace(params, eos_token_ids=() if ends is None else ends)

    def entries(
        self, prompt_ids: list[int], params: SamplingParams, names: Sequence[str]
    ) -> list[Entry]:
        """Checks a request; returns an entry for each of its texts.

        Args:
            prompt_ids: Token ids.
            params: What :meth:`params` returned.
            names: Of the texts.
        """
        params = self._with_bad_words(params)
        entries = [
            self._entry(prompt_ids, params, name, index)
            for index, name in enumerate(names)
        ]
        for entry in entries[1:]:
            entry.request.leader = entries[0].request
        return entries

    def _entry(
        self, prompt_ids: list[int], params: SamplingParams, name: str, index: int
    ) -> Entry:
        request = Request(list(prompt_ids), params.max_new_tokens)
        request.uses_prefixes = params.prompt_logprobs is None
        self._check_tokens("prompt_ids", request.tokens)
        seed = params.seed
        output = GenerationOutput(name, request.prompt, index=index)
        if self._tokenizer is not None:
            output.output_text = OutputText(
                self._tokenizer,
                params.stop_strings,
                keeps_stop_string=params.include_stop_str_in_output,
            )
        elif params.stop_strings:
            raise ValueError(
                "tokenizer must be given to the engine for stop_strings, got None"
            )
        if params.logprobs is not None:
            output.logprobs = []
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None for _ in request.prompt]
        grammar = rules = None
        structure: Any = params.structured_outputs  # no dict by now
        if structure is not None:
            grammar = self._grammars.grammar(structure)
        if params.changes_logits:
            rules = TokenRules(params, request.prompt, self._vocabulary, grammar)
        return Entry(
            request,
            params,
            self._random.getrandbits(63) if seed is None else seed + index,
            output,
            rules,
            grammar,
        )

    def _with_bad_words(self, params: SamplingParams) -> SamplingParams:
        """Returns the parameters with bad words as token ids, all of them known."""
        words = bad_word_ids(self._tokenizer, params.bad_words)
        for name, tokens in (
            ("logit_bias", list(params.logit_bias or {})),
            (
                "bad_words_ids",
                [token for word in params.bad_words_ids for token in word],
            ),
        ):
            if tokens:
                self._check_tokens(name, tokens)
        if not words:
            return params
        return dataclasses.replace(
            params, bad_words=(), bad_words_ids=(*params.bad_words_ids, *words)
        )

    def _check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        vocabulary = self._vocabulary
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise ValueError(
                f"{name} must be at least 0 and below {vocabulary}, got "
                f"{min(tokens)} to {max(tokens)}"
            )

    def too_long(self, request: Request) -> str | None:
        """Returns what is wrong if a sequence can get longer than any may."""
        length = request.num_prompt + request.max_new_tokens
        if length <= self._longest:
            return None
        return (
            f"{request.num_prompt} prompt tokens and {request.max_new_tokens} new ones "
            f"must be at most {self._longest} together, got {length}: "
            "raise max_sequence_length, or shorten prompt or max_new_tokens"
        )


def _prompt_reader(tokenizer: Any, config: GenerationConfig) -> PromptReader:
    pad = getattr(tokenizer, "pad_token_id", None)
    ends = config.eos_token_id
    return PromptReader(
        tokenizer,
        pad_token_id=config.pad_token_id if pad is None else pad,
        others=[
            getattr(tokenizer, "bos_token_id", None),
            getattr(tokenizer, "eos_token_id", None),
            config.bos_token_id,
            *(ends if isinstance(ends, (list, tuple)) else [ends]),
        ],
    )


def _params_of(fields: Mapping[str, Any]) -> SamplingParams:
    known = inspect.signature(SamplingParams).parameters
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"params must have fields among {[*known]}, got {unknown}")
    return SamplingParams(**fields)
