"""``model.generate(..., custom_generate=torch_rpa.transformers.generate)``.

transformers prepares everything (generation config, logits processors, stopping
criteria) and calls :func:`generate` for its loop. All prompts run in ragged steps of
static shape on the model's device; choosing tokens is the host's work, with
transformers' own processors, criteria and random numbers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from torch_rpa.layer_scales import LayerScales
from torch_rpa.transformers.guards import (
    ATTENTION_NAME,
    cache_among,
    check_attention,
    refuse_autocast,
)
from torch_rpa.transformers.lockstep import LockstepBatch
from torch_rpa.transformers.model_arguments import refuse_unknown_arguments
from torch_rpa.transformers.paging_options import PagingOptions
from torch_rpa.transformers.wrappers import refuse_adapters_of_texts

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

# Kinds of cache that hold exactly the keys and values that they are given.
_EXACT_CACHES = (
    None,
    "dynamic",
    "dynamic_full",
    "hybrid",
    "hybrid_chunked",
    "offloaded",
    "offloaded_hybrid",
    "offloaded_static",
    "sliding_window",
    "static",
)
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,  # i64[B, L], padded left or right
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    page_size: int = 16,
    num_pages: int | None = None,
    max_tokens_per_step: int | None = None,
    cache_dtype: torch.dtype | None = None,
    k_scale: LayerScales | None = None,
    v_scale: LayerScales | None = None,
    stop_strings: str | list[str] | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Generates for a batch of prompts, greedily or by sampling.

    Meant as the argument ``custom_generate`` of ``model.generate``, which passes on the
    options below. On an XLA device give ``input_ids`` on the CPU: transformers would
    compile programs of its own to prepare them elsewhere.

    Args:
        model: With ``attn_implementation="rpa"``, on an XLA device or the CPU.
        input_ids: Prompts, padded on either side; ``attention_mask`` says where.
        logits_processor: As prepared by transformers.
        stopping_criteria: As prepared by transformers.
        generation_config: As prepared by transformers.
        page_size: Tokens in a page of the cache.
        num_pages: Pages in the cache; None is enough for all prompts at full length.
        max_tokens_per_step: Most tokens in one step; longer prefills are cut into
            several steps. None takes all prompts in one step.
        cache_dtype: What keys and values are stored as; None is the model's dtype.
        k_scale: The cache stores ``key / k_scale``, which int8 needs; None is 1. A
            number for all layers, or a tensor ``[layers]`` or ``[layers, Hkv]``, or a
            sequence of numbers or tensors ``[Hkv]``. See
            ``torch_rpa.measure_kv_scales``.
        v_scale: The cache stores ``value / v_scale`` likewise.
        stop_strings: Text that ends a text, as for ``model.generate``, which takes the
            ``tokenizer`` that they need.
        model_kwargs: ``attention_mask`` and what transformers adds; anything else that
            a model could take is refused.

    Returns:
        What ``model.generate`` returns: ``[B, L + new tokens]`` on the device of
        ``input_ids``, or an output with ``sequences``, ``scores`` and ``logits``.

    Raises:
        ValueError: An option is out of range, the mask is not one of padding, or there
            is no tokenizer for ``stop_strings``.
        NotImplementedError: Beam search and other modes, foreign caches, hidden states,
            attention weights, guidance, images and other model inputs, autocast,
            and adapters that act on whole texts.
    """
    options = PagingOptions(
        page_size=page_size,
        num_pages=num_pages,
        max_tokens_per_step=max_tokens_per_step,
        cache_dtype=cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    call = _call_of_transformers()
    config = generation_config or model.generation_config
    mode = config.get_generation_mode(call.get("assistant_model"))
    refuse_other_modes(model, mode, config, model_kwargs)
    _refuse_a_cache(call, model_kwargs)
    check_attention(model)
    criteria = _on_cpu(stopping_criteria or (), StoppingCriteriaList)
    if stop_strings is not None:
        criteria.append(_stop_string_criteria(stop_strings, call.get("tokenizer")))
    ids = input_ids.cpu()
    prompts = _prompts(
        ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    )
    batch = LockstepBatch(
        model,
        prompts,
        max_new_tokens=_max_new_tokens(config, stopping_criteria, ids.shape[1]),
        page_size=options.page_size,
        num_pages=options.num_pages,
        max_tokens_per_step=options.max_tokens_per_step,
        cache_dtype=options.cache_dtype,
        k_scale=options.k_scale,
        v_scale=options.v_scale,
        compiles=not config.disable_compile,
    )
    out = _choose_tokens(
        batch,
        ids,
        _on_cpu(logits_processor or (), LogitsProcessorList),
        criteria,
        config,
        call.get("streamer"),
    )
    sequences: Any = out.sequences.to(input_ids.device)
    out.sequences = sequences
    return out if config.return_dict_in_generate else sequences


def _choose_tokens(
    batch: LockstepBatch,
    ids: torch.Tensor,  # i64[B, L]
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> GenerateDecoderOnlyOutput:
    """The loop of transformers, one token for every live sequence each time round."""
    pads_after_end = any(hasattr(c, "eos_token_id") for c in stopping_criteria)
    pad = getattr(config, "_pad_token_tensor", None)
    pad_token_id = config.pad_token_id if pad is None else int(pad)
    if pads_after_end and pad_token_id is None:
        raise ValueError("pad_token_id must be set where eos_token_id is, got None")
    live = torch.ones(len(ids), dtype=torch.bool)
    scores: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    while live.any():
        next_logits = batch.next_logits()  # f32[B, vocabulary]
        # Processors may write to what they are given.
        next_scores = logits_processor(ids, next_logits.clone())
        if config.output_logits:
            logits.append(next_logits)
        if config.output_scores:
            scores.append(next_scores)
        if config.do_sample:
            weights = next_scores.softmax(dim=-1)
            tokens = torch.multinomial(weights, num_samples=1).squeeze(1)
        else:
            tokens = next_scores.argmax(dim=-1)
        if pads_after_end:
            tokens = torch.where(live, tokens, pad_token_id)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens)
        seen_scores: Any = tuple(scores)
        live &= ~stopping_criteria(ids, seen_scores)
        for index, is_live in enumerate(live.tolist()):
            if is_live or not pads_after_end:
                batch.append(index, int(tokens[index]))
            else:
                batch.end(index)
    if streamer is not None:
        streamer.end()
    output: dict[str, Any] = {"sequences": ids}
    if config.output_scores:
        output["scores"] = tuple(scores)
    if config.output_logits:
        output["logits"] = tuple(logits)
    return GenerateDecoderOnlyOutput(**output)


def _prompts(
    ids: torch.Tensor,  # i64[B, L]
    mask: torch.Tensor | None,  # [B, L]
    positions: torch.Tensor | None,  # i64[..., B or 1, L]
) -> list[list[int]]:
    """Returns the tokens of each row without its padding."""
    mask = torch.ones_like(ids) if mask is None else mask.cpu()
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape {list(ids.shape)} of input_ids, got "
            f"{list(mask.shape)}"
        )
    is_token = mask != 0
    counts = is_token.sum(dim=1)
    for row, row_is_token in enumerate(is_token):
        count = int(counts[row])
        if not count or not (row_is_token[:count].all() or row_is_token[-count:].all()):
            raise ValueError(
                "attention_mask must have padding on one side of at least one token, "
                f"got {mask[row].tolist()} in row {row}"
            )
    counted = is_token.long().cumsum(dim=1) - 1
    # Some models have one for each kind of token, [n, B, L], which text counts alike.
    if positions is not None and ((positions.cpu() != counted) & is_token).any():
        raise NotImplementedError(
            "position_ids must count the tokens of each prompt from 0, got "
            f"{positions.tolist()}; leave them out"
        )
    return [tokens[keep].tolist() for tokens, keep in zip(ids, is_token, strict=True)]


def refuse_other_modes(
    model: PreTrainedModel,
    mode: GenerationMode,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Raises for whatever ragged greedy or sampling steps would answer differently."""
    if mode not in _MODES:
        raise NotImplementedError(
            f"generation must be greedy or sampling, got {mode.value!r}: leave out "
            "num_beams and the like, or use another attn_implementation"
        )
    if config.cache_implementation not in _EXACT_CACHES:
        raise NotImplementedError(
            "cache_implementation must be left out, got "
            f"{config.cache_implementation!r}; cache_dtype= quantises the paged cache"
        )
    if config.output_hidden_states:
        raise NotImplementedError(
            "output_hidden_states must be False, got True: steps are ragged; call the "
            "model itself with rpa= to get them"
        )
    if config.output_attentions:
        raise NotImplementedError(
            f"output_attentions must be False, got True: {ATTENTION_NAME} computes no "
            "attention weights; use another attn_implementation to get them"
        )
    if config.guidance_scale not in (None, 1):
        raise NotImplementedError(
            f"guidance_scale must be left out, got {config.guidance_scale}: the model "
            "is not called a second time without its prompt; use another "
            "attn_implementation"
        )
    refuse_autocast(model.device)
    refuse_adapters_of_texts(model)
    refuse_unknown_arguments(model, model_kwargs)


def _refuse_a_cache(call: dict[str, Any], model_kwargs: dict[str, Any]) -> None:
    given_cache = cache_among(call.get("kwargs", {}))
    cache = given_cache if given_cache is not None else cache_among(model_kwargs)
    if given_cache is not None or (cache is not None and cache.get_seq_length()):
        raise NotImplementedError(
            f"past_key_values must be left out, got {type(cache).__name__}: the paged "
            "cache is made for each call; pass the whole text as input_ids, or use "
            "paged_generation"
        )


def _call_of_transformers() -> dict[str, Any]:
    """Returns the arguments of the ``model.generate`` call that led here.

    transformers (4.57 to 5.24) passes none of ``streamer``, ``assistant_model`` and
    ``tokenizer`` on to a ``custom_generate`` function, so that a streamer would wait
    forever; and an empty cache of the caller looks like one of its own. Remove this
    when it does.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and code.co_filename.endswith(
            "transformers/generation/utils.py"
        ):
            call = dict(frame.f_locals)
            # It has dropped the tokenizer by now. Its decorator torch.no_grad has not.
            decorator = frame.f_back.f_locals if frame.f_back is not None else {}
            arguments = decorator.get("kwargs")
            if isinstance(arguments, dict):
                call["tokenizer"] = arguments.get("tokenizer")
            return call
        frame = frame.f_back
    return {}


def _stop_string_criteria(strings: str | list[str], tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be given to model.generate for stop_strings, got None and "
            f"{strings!r}"
        )
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)


def _max_new_tokens(
    config: GenerationConfig,
    stopping_criteria: Iterable[Any] | None,
    prompt_length: int,
) -> int:
    limits = [getattr(c, "max_length", None) for c in stopping_criteria or ()]
    limits = [limit for limit in [config.max_length, *limits] if limit is not None]
    if not limits or min(limits) <= prompt_length:
        raise ValueError(
            f"max_length must be more than the {prompt_length} tokens of input_ids, "
            f"got {limits}; set max_new_tokens"
        )
    return min(limits) - prompt_length


def _on_cpu(items: Iterable[Any], kind: type[Any]) -> Any:
    """Returns processors or criteria with their tensors on the CPU."""
    moved = kind()
    for item in items:
        tensors = {
            name: value.cpu()
            for name, value in vars(item).items()
            if isinstance(value, torch.Tensor) and value.device.type != "cpu"
        }
        if tensors:
            item = copy.copy(item)
            vars(item).update(tensors)
        moved.append(item)
    return moved
