"""A batch of prompts that grow together, one token each, in ragged steps."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from torch_rpa import devices
from torch_rpa.scheduling import OutOfPagesError, PageAllocator, Request, Scheduler
from torch_rpa.scheduling.scheduler import pages_for
from torch_rpa.transformers.model_runner import ModelRunner
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
        prefix_caching: bool = False,
        compiles: bool = True,
    ):
        """Starts every prompt; ``prefix_caching`` pays if some are extended later."""
        is_compiled = devices.is_compiled(model.device)
        step_tokens = max_tokens_per_step or sum(map(len, prompts))
        # A program serves all batches of similar size; the CPU needs no program.
        bucket = _power_of_two if is_compiled else _multiple_of_eight
        pages = pages_for(max(map(len, prompts)) + max_new_tokens, page_size)
        pages_per_sequence = _power_of_two(pages) if is_compiled else pages
        self.shapes = StepShapes(
            token_buckets=tuple(sorted({bucket(len(prompts)), bucket(step_tokens)})),
            num_sequences=len(prompts),
            pages_per_sequence=pages_per_sequence,
        )
        self.scheduler = Scheduler(
            PageAllocator(num_pages or len(prompts) * pages_per_sequence),
            page_size=page_size,
            max_num_sequences=len(prompts),
            max_tokens_per_step=step_tokens,
            prefix_caching=prefix_caching,
            lookahead=False,  # the caller chooses every token
        )
        self.requests = [Request(prompt, max_new_tokens) for prompt in prompts]
        for request in self.requests:
            self.scheduler.add(request)
        self.runner = ModelRunner(
            model,
            num_pages=self.scheduler.allocator.num_pages,
            page_size=page_size,
            cache_dtype=cache_dtype,
            fill_caches_first=step_tokens < sum(map(len, prompts)),
            compiles=compiles,
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
        new = self._logits
        while rows := self.scheduler.schedule():
            logits = self._step_logits(build_step_inputs(rows, self.shapes))
            if new is self._logits:  # earlier ones may be kept by the caller
                empty = logits.new_zeros(len(self.requests), logits.shape[1])
                new = empty if new is None else new.clone()
            assert new is not None
            for row, row_logits in zip(rows, logits, strict=False):
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

    def append(self, index: int, token: int) -> None:
        """Gives a sequence its next token, which the next step computes."""
        self.requests[index].append(token)

    def extend(self, index: int, tokens: list[int]) -> None:
        """Gives a sequence any number of tokens, which the next steps compute."""
        former = self.requests[index]
        if len(tokens) == 1:
            self.append(index, tokens[0])
        elif tokens:  # as a new prompt, whose full pages are found again
            self.end(index)
            known = former.tokens + tokens
            room = former.num_prompt + former.max_new_tokens - len(known)
            request = Request(known, max(1, room))
            self.requests[index] = request
            self._indices[request] = index
            self._live.add(request)
            self.scheduler.add(request)

    def end(self, index: int) -> None:
        """Frees the pages of a sequence; may be repeated."""
        request = self.requests[index]
        if request in self._live:
            self._live.remove(request)
            self.scheduler.end(request)


def _power_of_two(size: int) -> int:
    return max(8, 1 << (size - 1).bit_length())


def _multiple_of_eight(size: int) -> int:
    return -(-size // 8) * 8
