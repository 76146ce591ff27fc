"""A model on its device with its paged caches; knows nothing about requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from torch_rpa import devices
from torch_rpa.layer_scales import LayerScales, scale_tensors
from torch_rpa.transformers.attention import use_rpa
from torch_rpa.transformers.context import (
    RPAContext,
    empty_kv_caches,
    num_key_heads,
)
from torch_rpa.transformers.missing_scales import (
    warn_of_missing_scales,
    warn_of_unused_scales,
)
from torch_rpa.transformers.step_inputs import StepInputs


class ModelRunner:
    """Runs a model over ragged steps.

    Attributes:
        model: The model, on ``device``, with this project's attention.
        device: Where the model and its caches are.
        kv_caches: One paged cache for each layer, updated in place by every step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_pages: int,
        page_size: int,
        device: torch.device | str | None = None,
        cache_dtype: torch.dtype | None = None,
        k_scale: LayerScales | None = None,
        v_scale: LayerScales | None = None,
        fill_caches_first: bool = True,
        compiles: bool = True,
        window: int | None = None,
        attention: Callable[..., torch.Tensor] = torch.ops.rpa.ragged_paged_attention,
    ):
        """Moves the model to its device and makes its caches.

        Args:
            model: A causal language model of transformers. It is switched to this
                project's attention.
            num_pages: Pages in the cache of each layer.
            page_size: Tokens in a page.
            device: One of :func:`torch_rpa.devices.names`; None is where the model is.
            cache_dtype: What keys and values are stored as; None is the model's dtype.
            k_scale, v_scale: See ``EngineOptions``. Those of layers become tensors, so
                that their numbers are no part of a compiled program.
            attention: See ``RPAContext``.
            fill_caches_first: Make the caches in a program of their own. Otherwise the
                first step's program makes them: one program fewer, unless more steps
                have the first one's sizes, as in chunked prefill.
            compiles: Compile steps where the device does not do so by itself.
            window: Farther back than so many tokens, pages may be gone; see
                ``RPAContext``.
        """
        self.device = devices.open_device(device or model.device)
        self._compiles = compiles
        self._window = window
        self._attention = attention
        self.model = use_rpa(model)
        if model.device != self.device:
            self.model.to(self.device)  # pyright: ignore[reportArgumentType]
            self.model.tie_weights()  # moving to xla or tpu unties them
        self._cache_shape = num_pages, page_size
        self._cache_dtype = cache_dtype or model.dtype
        warn_of_missing_scales(self._cache_dtype, k_scale, v_scale)
        warn_of_unused_scales(model, self._cache_dtype, k_scale, v_scale)
        heads = num_key_heads(model)
        self._k_scale = scale_tensors("k_scale", k_scale, heads, self.device)
        self._v_scale = scale_tensors("v_scale", v_scale, heads, self.device)
        self.kv_caches = self._empty_caches()
        if fill_caches_first:
            self.sync()

    def renew_caches(self) -> None:
        """Makes the caches anew, in a program of their own, after a step that failed.

        A device that takes a cache for a program, to update it in place, does not give
        it back if the program fails.
        """
        self.kv_caches = []  # so that there is room for the new ones
        self.kv_caches = self._empty_caches()
        self.sync()

    def _empty_caches(self) -> list[torch.Tensor]:
        return empty_kv_caches(
            self.model, *self._cache_shape, dtype=self._cache_dtype, device=self.device
        )

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what to call for a function of static shapes, in one program."""
        if self._compiles:
            function = devices.compiled(function, self.device)
        return torch.no_grad()(function)

    def step(
        self, choose: Callable[..., Any], *, all_positions: bool = False
    ) -> Callable[..., Any]:
        """Returns a step from its inputs to its result, in one program where it can be.

        On a lazy device it runs at the next ``sync``.

        Args:
            choose: What to make of the logits ``[S, vocabulary]``, which say what may
                follow the last token of each row.
            all_positions: Give it the logits ``[T, vocabulary]`` after every token.

        Returns:
            A function of what :meth:`forward` takes, and of what ``choose`` takes after
            the logits. It keeps this runner alive, so do not keep it here: in a cycle
            the caches would hold their memory until Python looks for cycles.
        """

        def compute(
            inputs: StepInputs,
            last_generated: torch.Tensor | None = None,
            *others: Any,
        ) -> Any:
            logits = self.forward(inputs, last_generated, all_positions=all_positions)
            return choose(logits, *others)

        return self.compiled(compute)

    def forward(
        self,
        inputs: StepInputs,
        last_generated: torch.Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> torch.Tensor:
        """Computes logits ``[S, vocabulary]``, operation by operation if not compiled.

        Args:
            inputs: On the device.
            last_generated: i64 ``[S]`` on the device, one token for each row of the
                step before; needed if ``inputs.pending_rows`` refers to it.
            all_positions: Return logits ``[T, vocabulary]``, of every token.
        """
        input_ids = inputs.input_ids
        if last_generated is not None:
            rows = inputs.pending_rows
            # A row without a token has a negative id, and its request ends soon.
            generated = last_generated[rows.clamp(min=0)].clamp(min=0)
            input_ids = torch.where(rows < 0, input_ids, generated)
        return self.model(
            input_ids=input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            rpa=RPAContext(
                self.kv_caches,
                inputs.batch,
                k_scale=self._k_scale,
                v_scale=self._v_scale,
                attention=self._attention,
                window=self._window,
            ),
            logits_to_keep=0 if all_positions else inputs.last_tokens,
        ).logits[0]

    def sync(self) -> None:
        """Starts all that is pending on the device, without waiting for it."""
        devices.sync(self.device)
