"""``with paged_generation(model): model.generate(...)``, for calls that cannot change.

Inside the block transformers runs its own loop, and three methods of the model instance
are replaced: the one that makes the cache makes a :class:`PagedCache`, the one that
prepares inputs leaves them on the host, and ``forward`` takes the new columns of the
padded batch, computes their tokens in ragged steps, and returns the logits of the last
token of each sequence, on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from torch_rpa.layer_scales import LayerScales
from torch_rpa.transformers.generation import refuse_other_modes
from torch_rpa.transformers.guards import cache_among, check_attention
from torch_rpa.transformers.model_arguments import refuse_unknown_arguments
from torch_rpa.transformers.paged_cache import PagedCache
from torch_rpa.transformers.paging_options import PagingOptions
from torch_rpa.transformers.wrappers import innermost, refuse_adapters_of_texts

_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
# transformers 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"


@contextlib.contextmanager
def paged_generation(
    model: PreTrainedModel,
    *,
    page_size: int = 16,
    num_pages: int | None = None,
    max_length: int | None = None,
    max_tokens_per_step: int | None = None,
    cache_dtype: torch.dtype | None = None,
    k_scale: LayerScales | None = None,
    v_scale: LayerScales | None = None,
) -> Iterator[None]:
    """Pages the cache of every ``model.generate`` in the block, which stays as it is.

    For callers that cannot pass ``custom_generate``, such as pipelines. Greedy search
    and sampling, of prompts padded on either side. On an XLA device keep ``input_ids``
    on the CPU. The cache that ``generate`` returns with ``return_dict_in_generate`` can
    be given to later calls in the block, until it holds ``max_length`` tokens. It can
    be cropped and copied; a copy computes its keys and values again.

    Args:
        model: With ``attn_implementation="rpa"``, on an XLA device or the CPU. It may
            be compiled, and may be a model of PEFT around it.
        page_size: Tokens in a page of the cache.
        num_pages: Pages in the cache of each layer; None is enough for all sequences at
            full length.
        max_length: Tokens of each sequence, padding included, that a cache has room
            for; None is what the call that makes it asks for.
        max_tokens_per_step: Most tokens in one step; longer prefills are cut into
            several steps. None takes all prompts in one step.
        cache_dtype: What keys and values are stored as; None is the model's dtype.
        k_scale: The cache stores ``key / k_scale``, which int8 needs; None is 1. A
            number for all layers, or a tensor ``[layers]`` or ``[layers, Hkv]``, or a
            sequence of numbers or tensors ``[Hkv]``. See
            ``torch_rpa.measure_kv_scales``.
        v_scale: The cache stores ``value / v_scale`` likewise.

    Raises:
        ValueError: An option is out of range, or the model has another attention or is
            in such a block already.
        NotImplementedError: Inside the block: beam search and other modes, foreign
            caches, hidden states, attention weights, guidance, images and other
            model inputs, autocast, and adapters that act on whole texts.
    """
    refuse_adapters_of_texts(model)
    model = innermost(model)
    check_attention(model)
    options = PagingOptions(
        page_size=page_size,
        num_pages=num_pages,
        max_length=max_length,
        max_tokens_per_step=max_tokens_per_step,
        cache_dtype=cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    paging = _Paging(model, options)
    if isinstance(getattr(model.forward, "paging", None), _Paging):
        raise ValueError(
            "model must not be in a block of paged_generation already, got "
            f"{type(model).__name__} in another one"
        )
    with (
        _replaced(model, "forward", paging.forward),
        _replaced(model, "prepare_inputs_for_generation", paging.prepare_inputs),
        _replaced(model, "_prepare_cache_for_generation", paging.prepare_cache),
    ):
        try:
            yield
        finally:
            paging.close()


@contextlib.contextmanager
def _replaced(model: Any, name: str, method: Callable) -> Iterator[None]:
    """Replaces a method of one model; ``method`` takes the former one first."""
    former = getattr(model, name)
    own = vars(model).get(name)

    @functools.wraps(former)  # transformers reads its signature
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return method(former, *args, **kwargs)

    replacement.paging = method.__self__  # pyright: ignore[reportAttributeAccessIssue]
    vars(model)[name] = replacement
    try:
        yield
    finally:
        del vars(model)[name]
        if own is not None:
            vars(model)[name] = own


class _Paging:
    """The methods that replace those of a model, and the caches that they made."""

    def __init__(self, model: PreTrainedModel, options: PagingOptions):
        self._model = model
        self._options = options
        self._caches: weakref.WeakSet[PagedCache] = weakref.WeakSet()
        self._page = self._compute_new_columns
        if model._compiled_call_impl is not None:  # by model.compile()
            self._page = torch.compiler.disable(
                self._page,
                reason="paged_generation compiles the ragged steps inside alone, so "
                "fullgraph must be False",
            )

    def close(self) -> None:
        """Frees every cache."""
        for cache in self._caches:
            cache.close()

    def prepare_cache(
        self,
        former: Callable,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Puts a paged cache among the arguments of the model."""
        del former, batch_size  # the batch may still be repeated
        check_attention(self._model)
        refuse_other_modes(
            self._model, generation_mode, generation_config, model_kwargs
        )
        generation_config.use_cache = True  # the tokens are the same, and sooner
        if generation_config.prefill_chunk_size is not None:
            raise NotImplementedError(
                "prefill_chunk_size must be left out, got "
                f"{generation_config.prefill_chunk_size}; paged_generation cuts long "
                "prefills with max_tokens_per_step="
            )
        cache = cache_among(model_kwargs)
        if cache is None:
            capacity = self._options.max_length or max_cache_length + 1
            compiles = not generation_config.disable_compile
            cache = PagedCache(
                self._model,
                capacity,
                self._options,
                compiles=compiles,
                caches_of_block=self._caches,
            )
            model_kwargs[CACHE_NAME] = cache
        self._require_own(cache).require_room(max_cache_length)

    def prepare_inputs(
        self, former: Callable, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What the model prepares, on the host, where the ragged batch is built."""
        cache = self._require_own(cache_among(kwargs))
        # None is all; transformers before 5.20 does not say.
        num_new = kwargs.get(
            "next_sequence_length", input_ids.shape[1] - cache.num_columns
        )
        if num_new is not None and num_new < 1:
            raise ValueError(
                "input_ids must have more columns than past_key_values has seen, got "
                f"{input_ids.shape[1]} and {cache.num_columns}; crop it to fewer, or "
                "leave it out"
            )
        inputs = former(input_ids, *args, **kwargs)
        if inputs.get("input_ids") is None:
            return inputs
        start = input_ids.shape[1] - inputs["input_ids"].shape[1]
        if cache_among(inputs) is None:
            # Dropped where rotary factors change, which the cache sees to by itself.
            inputs[CACHE_NAME] = cache
            start = 0 if num_new is None else input_ids.shape[1] - num_new
        inputs["input_ids"] = input_ids[:, start:]
        if kwargs.get("attention_mask") is not None:
            inputs["attention_mask"] = kwargs["attention_mask"]
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = kwargs["position_ids"][..., start:]
        return inputs

    def forward(self, former: Callable, *args: Any, **kwargs: Any) -> Any:
        """Computes the new columns of a padded batch."""
        if kwargs.get("rpa") is not None:
            return former(*args, **kwargs)
        return self._page(former, *args, **kwargs)

    def _compute_new_columns(self, former: Callable, *args: Any, **kwargs: Any) -> Any:
        check_attention(self._model)
        arguments = dict(inspect.signature(former).bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        cache = self._require_own(cache_among(arguments))
        ids = arguments.pop("input_ids", None)
        refuse_unknown_arguments(self._model, arguments)
        num_kept = arguments.get("logits_to_keep", 1)
        if ids is None or num_kept != 1:
            raise NotImplementedError(
                "the model must be called with input_ids and logits_to_keep=1 in a "
                f"block of paged_generation, got {'no ' if ids is None else ''}"
                f"input_ids and logits_to_keep={num_kept}"
            )
        if arguments.get("return_dict") is False or torch.is_grad_enabled():
            raise NotImplementedError(
                "the model must be called with return_dict=True and under "
                "torch.no_grad() in a block of paged_generation, got return_dict "
                f"{arguments.get('return_dict')} and gradients "
                f"{'on' if torch.is_grad_enabled() else 'off'}"
            )
        if ids.device.type != "cpu":
            warnings.warn(
                f"input_ids are on {ids.device}: transformers compiles programs of its "
                "own for each length; keep them on the CPU",
                stacklevel=2,
            )
        logits = cache.next_logits(
            ids.cpu(), arguments.get("attention_mask"), arguments.get("position_ids")
        )
        output: Any = {"logits": logits[:, None].to(ids.device), CACHE_NAME: cache}
        return CausalLMOutputWithPast(**output)

    def _require_own(self, cache: Any) -> PagedCache:
        if not isinstance(cache, PagedCache) or cache not in self._caches:
            raise ValueError(
                "past_key_values must be a cache that model.generate made in this "
                f"block of paged_generation, got {type(cache).__name__}; leave it out"
            )
        return cache
