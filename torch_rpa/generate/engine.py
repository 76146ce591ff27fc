"""Runs a model over ragged steps with paged caches, greedily."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedModel

from torch_rpa.generate.batching import StepInputs, StepShapes, build_step_inputs
from torch_rpa.generate.page_allocator import PageAllocator
from torch_rpa.generate.scheduler import Scheduler, pages_for
from torch_rpa.transformers import RPAContext, empty_kv_caches, use_rpa

# Smaller steps are padded to this many tokens.
MIN_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How to generate; nothing here but the limits and dtype changes the tokens.

    Attributes:
        device: ``"xla"`` or ``"cpu"``.
        max_new_tokens: Most tokens to generate for each prompt.
        page_size: Tokens in a page of the cache.
        num_pages: Pages in the cache; None is enough for all prompts at full length.
        max_tokens_per_step: Most tokens in one step; longer prefills are cut into
            several steps. None takes all prompts in one step.
        cache_dtype: What keys and values are stored as; None is the model's dtype.
    """

    device: str = "xla"
    max_new_tokens: int = 48
    page_size: int = 16
    num_pages: int | None = None
    max_tokens_per_step: int | None = None
    cache_dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Attributes:
        num_tokens: Tokens computed, without padding.
        num_generated: Tokens generated.
        seconds: Wall time, compilation included.
        num_compilations: Programs that the step had to compile.
    """

    num_tokens: int
    num_generated: int
    seconds: float
    num_compilations: int


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """Generated token ids for each prompt, and the steps that made them."""

    generated: list[list[int]]
    steps: list[StepRecord]

    @property
    def num_generated(self) -> int:
        return sum(step.num_generated for step in self.steps)

    @property
    def num_compilations(self) -> int:
        return sum(step.num_compilations for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens for each second, compilation included."""
        return _rate(self.steps)

    @property
    def compiled_tokens_per_second(self) -> float:
        """The same over the steps whose program had been compiled before."""
        return _rate([step for step in self.steps if not step.num_compilations])


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: EngineOptions,
    *,
    eos_token_ids: Iterable[int] = (),
    on_step: Callable[[StepRecord], object] = lambda record: None,
) -> GenerationResult:
    """Generates greedily for all prompts at once.

    Args:
        model: A causal language model of transformers. It is moved to the device and
            switched to this project's attention.
        prompts: Token ids, at least one for each prompt.
        options: Device, limits and cache.
        eos_token_ids: Tokens that end a text.
        on_step: Called after each step.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    longest = max(map(len, prompts)) + options.max_new_tokens
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", longest)
    if longest > limit:
        raise ValueError(
            f"prompts and max_new_tokens must fit the model's {limit} positions "
            f"together, got {longest}; shorten one of them"
        )
    max_tokens_per_step = options.max_tokens_per_step or sum(map(len, prompts))
    buckets = {_aligned(size) for size in (len(prompts), max_tokens_per_step)}
    shapes = StepShapes(
        token_buckets=tuple(sorted(buckets)),
        num_sequences=len(prompts),
        pages_per_sequence=pages_for(longest, options.page_size),
    )
    allocator = PageAllocator(options.num_pages or _pages_for_all(prompts, options))
    scheduler = Scheduler(
        prompts,
        allocator,
        page_size=options.page_size,
        max_new_tokens=options.max_new_tokens,
        max_tokens_per_step=max_tokens_per_step,
        eos_token_ids=eos_token_ids,
    )
    runner = ModelRunner(model, allocator.num_pages, options)
    steps = []
    while rows := scheduler.next_step():
        start, compilations = time.perf_counter(), runner.num_compilations()
        next_tokens = runner.step(build_step_inputs(rows, shapes))
        steps.append(
            StepRecord(
                num_tokens=sum(row.num_tokens for row in rows),
                num_generated=scheduler.complete(rows, next_tokens[: len(rows)]),
                seconds=time.perf_counter() - start,
                num_compilations=runner.num_compilations() - compilations,
            )
        )
        on_step(steps[-1])
    return GenerationResult([r.generated for r in scheduler.requests], steps)


class ModelRunner:
    """A model on its device with its paged caches; knows nothing about requests.

    Args:
        model: Moved to the device and switched to this project's attention.
        num_pages: Pages in each cache.
        options: Device, page size and cache dtype.
        fill_caches_first: Make the caches in a program of their own. Otherwise the
            first step's program makes them: one program fewer, unless more steps have
            the first one's sizes, as in chunked prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_pages: int,
        options: EngineOptions,
        *,
        fill_caches_first: bool = True,
    ):
        if options.device not in ("xla", "cpu"):
            raise ValueError(f"device must be 'xla' or 'cpu', got {options.device!r}")
        self.is_xla = options.device == "xla"
        self.device = torch.device(options.device)
        if self.is_xla:
            # torch_xla must open the device before anything imports JAX.
            import torch_xla

            self.device = torch_xla.device()
        self.model = use_rpa(model)
        if model.device != self.device:
            self.model.to(self.device)  # pyright: ignore[reportArgumentType]
            self.model.tie_weights()  # moving to an XLA device unties them
        self.kv_caches = empty_kv_caches(
            self.model,
            num_pages,
            options.page_size,
            dtype=options.cache_dtype or model.dtype,
            device=self.device,
        )
        if fill_caches_first:
            self._sync()

    def step(self, inputs: StepInputs) -> list[int]:
        """Computes a step and returns the next token of each of the S sequences."""
        next_tokens = self._forward(inputs).argmax(dim=-1)
        self._sync()
        return next_tokens.cpu().tolist()

    def logits(self, inputs: StepInputs) -> torch.Tensor:
        """Computes a step and returns its logits, float32 ``[S, vocabulary]``, on CPU.

        Row ``s`` says what may follow the last token of sequence ``s``.
        """
        logits = self._forward(inputs).float()
        self._sync()
        return logits.cpu()

    @torch.no_grad()
    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        inputs = inputs.to(self.device)
        return self.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            rpa=RPAContext(self.kv_caches, inputs.batch),
            logits_to_keep=inputs.last_tokens,
        ).logits[0]  # [S, vocabulary]

    def num_compilations(self) -> int:
        """Programs compiled by this process so far."""
        if not self.is_xla:
            return 0
        import torch_xla.debug.metrics

        compile_times = torch_xla.debug.metrics.metric_data("CompileTime")
        return compile_times[0] if compile_times else 0

    def _sync(self) -> None:
        # Without it, reading the tokens would leave the cache updates pending: they
        # would join the next step's graph and lose their buffers.
        if self.is_xla:
            import torch_xla

            torch_xla.sync()


def _pages_for_all(prompts: Sequence[Sequence[int]], options: EngineOptions) -> int:
    return sum(
        # The last token is generated and never cached.
        pages_for(len(prompt) + options.max_new_tokens - 1, options.page_size)
        for prompt in prompts
    )


def _aligned(num_tokens: int) -> int:
    return -(-num_tokens // MIN_TOKENS) * MIN_TOKENS


def _rate(steps: Sequence[StepRecord]) -> float:
    seconds = sum(step.seconds for step in steps)
    return sum(step.num_generated for step in steps) / seconds if seconds else 0.0
