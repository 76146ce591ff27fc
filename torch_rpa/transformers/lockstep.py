"""A batch of prompts that grow together, one token each, in ragged steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from torch_rpa import devices
from torch_rpa.layer_scales import LayerScales
from torch_rpa.scheduling import (
    OutOfPagesError,
    PageAllocator,
    Request,
    Row,
    Scheduler,
)
from torch_rpa.scheduling.scheduler import pages_for
from torch_rpa.transformers.model_runner import ModelRunner
from torch_rpa.transformers.rotary import length_scaling, refuse_other_factors
from torch_rpa.transformers.step_inputs import (
    StepInputs,
    StepShapes,
    build_step_inputs,
)


class LockstepBatch:
    """Prompts that grow together by one token each, in ragged steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        page_size: int,
        num_pages: int | None,
        max_tokens_per_step: int | None,
        cache_dtype: torch.dtype | None,
        k_scale: LayerScales | None = None,
        v_scale: LayerScales | None = None,
        prefix_caching: bool = False,
        compiles: bool = True,
        attention: Callable[..., torch.Tensor] = torch.ops.rpa.ragged_paged_attention,
    ):
        """Starts every prompt.

        Args:
            model, page_size, num_pages, max_tokens_per_step, cache_dtype: As in
                ``paged_generation``.
            k_scale, v_scale, attention: As in ``ModelRunner``.
            prompts: Token ids of each.
            max_new_tokens: So many tokens each may grow by.
            prefix_caching: Keep pages, which pays if some are extended later.
            compiles: Compile steps where the device does not do so by itself.
        """
        is_compiled = devices.is_compiled(model.device)
        self._scaling = length_scaling(model)
        step_tokens = max_tokens_per_step or sum(map(len, prompts))
        pages_per_sequence = pages_for(
            max(map(len, prompts)) + max_new_tokens, page_size
        )
        token_buckets: set[int] = set()
        if is_compiled:  # a program serves all batches of similar size
            pages_per_sequence = _power_of_two(pages_per_sequence)
            num_extra = 0 if self._scaling is None else 1  # a token of padding
            token_buckets = {
                _power_of_two(n + num_extra) for n in (len(prompts), step_tokens)
            }
        self.shapes = StepShapes(
            token_buckets=tuple(sorted(token_buckets)),
            num_sequences=len(prompts),
            pages_per_sequence=pages_per_sequence,
        )
        self.scheduler = Scheduler(
            PageAllocator(num_pages or len(prompts) * pages_per_sequence),
            page_size=page_size,
            max_num_sequences=len(prompts),
            max_tokens_per_step=step_tokens,
            # Pages of sequences of other lengths may have other factors.
            prefix_caching=prefix_caching and self._scaling is None,
            lookahead=False,  # the caller chooses every token
        )
        self.requests = [Request(prompt, max_new_tokens) for prompt in prompts]
        # As transformers counts them: an ended sequence goes on with padding.
        self._lengths = [len(prompt) for prompt in prompts]
        for request in self.requests:
            self.scheduler.add(request)
        self.runner = ModelRunner(
            model,
            num_pages=self.scheduler.allocator.num_pages,
            page_size=page_size,
            cache_dtype=cache_dtype,
            k_scale=k_scale,
            v_scale=v_scale,
            fill_caches_first=step_tokens < sum(map(len, prompts)),
            compiles=compiles,
            attention=attention,
        )
        self._compute_logits = self.runner.step(torch.Tensor.float)
        self._indices = {r: index for index, r in enumerate(self.requests)}
        self._live = set(self.requests)
        self._logits: torch.Tensor | None = None

    def next_logits(self) -> torch.Tensor:
        """Computes every waiting token; returns what may follow each sequence.

        Returns:
            float32 ``[B, vocabulary]`` on the CPU. Sequences that have ended keep the
            logits that they ended with.
        """
        self._start_switched_again()
        new = self._logits
        while rows := self.scheduler.schedule():
            for part, longest in self._parts(rows):
                logits = self._step_logits(
                    build_step_inputs(part, self.shapes, longest=longest)
                )
                if new is self._logits:  # earlier ones may be kept by the caller
                    empty = logits.new_zeros(len(self.requests), logits.shape[1])
                    new = empty if new is None else new.clone()
                assert new is not None
                for row, row_logits in zip(part, logits, strict=False):
                    if row.is_last:
                        new[self._indices[row.request]] = row_logits
        if not all(request.num_pending for request in self._live):
            raise OutOfPagesError(
                f"{len(self._live)} sequences do not fit "
                f"{self.scheduler.allocator.num_pages} pages together: raise "
                "num_pages, or ask for fewer or shorter sequences at once"
            )
        assert new is not None
        self._logits = new
        return new

    def _step_logits(self, inputs: StepInputs) -> torch.Tensor:
        """Returns float32 ``[S, vocabulary]`` on the CPU: what may follow each row."""
        logits = self._compute_logits(inputs.to(self.runner.device))
        self.runner.sync()
        return logits.cpu()

    def _parts(self, rows: list[Row]) -> list[tuple[list[Row], int]]:
        """Splits a step into model calls, each with the length that it must show."""
        scaling = self._scaling
        if scaling is None:
            return [(rows, 0)]
        if not scaling.has_one_switch:  # as in the padded batch of transformers
            return [(rows, max(self._lengths))]
        parts: tuple[list[Row], list[Row]] = [], []
        for row in rows:
            parts[len(row.request.tokens) > scaling.unscaled_length].append(row)
        lengths = 0, scaling.unscaled_length + 1
        return [pair for pair in zip(parts, lengths, strict=True) if pair[0]]

    def _start_switched_again(self) -> None:
        """Has sequences computed again whose factors are no longer those before."""
        scaling = self._scaling
        if scaling is None or not scaling.starts_again:
            return
        for index, request in enumerate(self.requests):
            has_switched = (
                request.num_prompt <= scaling.unscaled_length < len(request.tokens)
            )
            if has_switched and request in self._live:
                self._restart(index, request.tokens)

    def append(self, index: int, token: int) -> None:
        """Gives a sequence its next token, which the next step computes."""
        self.requests[index].append(token)
        self._lengths[index] += 1

    def read(self, texts: list[list[int]]) -> None:
        """Gives every sequence all its tokens; the next steps compute what is new.

        A text that is not the former one and one more token is computed as a new
        prompt, whose full pages are found again.

        Raises:
            NotImplementedError: The keys of earlier tokens would have to stay as they
                were computed, with the rotary factors of their time. Nothing is done.
        """
        former = [request.tokens for request in self.requests]
        changed = [i for i, text in enumerate(texts) if text != former[i]]
        restarted = [i for i in changed if texts[i][:-1] != former[i]]
        if restarted:
            # Where the longest sequence sets the factors, those of all others too.
            is_alone = self._scaling is not None and self._scaling.has_one_switch
            of = restarted if is_alone else range(len(texts))
            refuse_other_factors(self._scaling, max(len(texts[i]) for i in of))
        for index in changed:
            if index in restarted:
                self._restart(index, texts[index])
                self._lengths[index] = len(texts[index])
            else:
                self.append(index, texts[index][-1])

    def end(self, index: int) -> None:
        """Frees the pages of a sequence, which goes on with a token of padding."""
        self._release(index)
        self._lengths[index] += 1

    def _restart(self, index: int, tokens: list[int]) -> None:
        """Has a sequence computed from its first token on."""
        former = self.requests[index]
        self._release(index)
        room = former.num_prompt + former.max_new_tokens - len(tokens)
        request = Request(tokens, max(1, room))
        self.requests[index] = request
        self._indices[request] = index
        self._live.add(request)
        self.scheduler.add(request)

    def _release(self, index: int) -> None:
        request = self.requests[index]
        if request in self._live:
            self._live.remove(request)
            self.scheduler.end(request)


def _power_of_two(size: int) -> int:
    return max(8, 1 << (size - 1).bit_length())
