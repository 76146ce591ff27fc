"""Runs the kernel: on a TPU for real, elsewhere in Pallas TPU interpret mode.

This is the one place that knows the difference. Interpret mode simulates the memories,
the DMAs and the semaphores. It fills fresh memory with NaN, carries out a DMA when
somebody waits for it (or at once, if asked to), and follows every access with a
happens-before race detector. By itself it is silent about a DMA that nobody waits for,
and only prints that a semaphore is left signalled. Here a test fails for either.
"""

import contextlib
import dataclasses
import functools
import gc
import io
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention import BlockSizes, ragged_paged_attention
from tests.conftest import HAS_TPU
from tests.support import interpreter, numerics, ragged_batches

# Small, so that short sequences cross many boundaries.
SMALL_BLOCKS = BlockSizes(decode_block_kv=32, block_q=32, block_kv=32)

MAX_PROGRAMS = 8

INTERPRET_PARAMS = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    **interpreter.GOES_ON_AFTER_A_RACE,
)

NOT_IN_THE_ORACLE = (
    "out_dtype",
    "chunk_prefill_size",
    "decode_q_len",
    "chip",
    "return_lse",
    "batch_invariant",
)

# When copies are carried out: "on_wait" is as late as possible, "eager" at once.
CopyTime = Literal["on_wait", "eager"]


def run_kernel(
    arguments: tuple,
    *,
    block_sizes: BlockSizes | None = SMALL_BLOCKS,
    copies: CopyTime = "on_wait",
    **options,
) -> tuple[np.ndarray, ...]:
    """Runs the kernel and checks how it behaved.

    Calls with the same shapes and options share one compilation.

    Args:
      arguments: ``RaggedBatch.jax_arguments``, or the same with changes.
      block_sizes: Tile sizes.
      copies: When copies are carried out in interpret mode.
      **options: Keyword arguments of ``ragged_paged_attention``. Those that are arrays
        of NumPy are arguments of the program.

    Returns:
      The output, the logarithms if they are asked for, and the cache.

    Raises:
      AssertionError: See ``checked_interpret_mode``.
    """
    arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in options.items() if name not in arrays}
    function = _jitted(copies, block_sizes=block_sizes, **static)
    with contextlib.nullcontext() if HAS_TPU else checked_interpret_mode():
        return tuple(map(np.asarray, function(*arguments, **arrays)))


def assert_kernel_matches_oracle(
    batch: ragged_batches.RaggedBatch,
    *,
    block_sizes: BlockSizes | None = SMALL_BLOCKS,
    copies: CopyTime = "on_wait",
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the kernel on a batch; fails unless output and whole cache are right.

    Keys and values are not even passed when nothing is to be written.

    Returns:
      The output and the cache.
    """
    updates = options.get("update_kv_cache", True)
    arguments = batch.jax_arguments
    if not updates:
        arguments = (arguments[0], None, None, *arguments[3:])
    out, *lse, kv_cache = run_kernel(
        arguments, block_sizes=block_sizes, copies=copies, **options
    )
    assert len(lse) == options.get("return_lse", False)
    assert out.dtype == options.get("out_dtype", batch.queries.dtype)
    changes_result = {
        name: value for name, value in options.items() if name not in NOT_IN_THE_ORACLE
    }
    numerics.assert_matches_oracle(
        out, kv_cache, batch.arguments, lse=lse[0] if lse else None, **changes_result
    )
    return out, kv_cache


@contextlib.contextmanager
def checked_interpret_mode():
    """Checks how every kernel behaves that runs within in interpret mode.

    Raises:
      AssertionError: A data race, a semaphore that was left signalled, a copy that
        nobody waited for, or no kernel at all.
    """
    printed = io.StringIO()
    problems_of_kernels: list[list[str]] = []
    interpreter.reset()
    try:
        # The interpreter prints where it finds a race.
        with (
            contextlib.redirect_stdout(printed),
            interpreter.watched(
                lambda: problems_of_kernels.append(list(_problems_at_exit()))
            ),
        ):
            yield
        assert problems_of_kernels, "nothing ran in interpret mode"
        problems = [problem for each in problems_of_kernels for problem in each]
        assert not problems, "\n".join([*problems, printed.getvalue()[:4000]])
    finally:
        interpreter.reset()


def _problems_at_exit() -> Iterator[str]:
    """What is wrong with the state that a kernel leaves behind."""
    if interpreter.found_races():
        yield "data race"
    for semaphore in interpreter.semaphores():
        if semaphore.counts.any():
            yield (
                f"semaphore {semaphore.id} is left with a non-zero count: "
                f"{semaphore.counts.tolist()}"
            )
    for started_at in interpreter.copies_not_carried_out():
        yield f"a copy was started and never awaited: {started_at}"


def forget_old_programs() -> None:
    """Frees compiled programs once there are some; for use between tests.

    A program in interpret mode takes about a thousand memory maps. A process may have
    65,530, and then the compiler crashes.
    """
    if _jitted.cache_info().currsize >= MAX_PROGRAMS:
        _jitted.cache_clear()
        jax.clear_caches()
        gc.collect()


def _quick_compilation() -> dict[str, int | bool]:
    """Options of XLA: a program runs once or twice, and compiling it takes longer."""
    options: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11, 1):
        # A fifth of the time. Later releases have no other emitters.
        options["xla_cpu_use_fusion_emitters"] = False
    return options


@functools.cache
def _jitted(copies: CopyTime, **options):
    update_kv_cache = options.get("update_kv_cache", True)
    params = dataclasses.replace(INTERPRET_PARAMS, dma_execution_mode=copies)
    return jax.jit(
        functools.partial(
            ragged_paged_attention,
            interpret=False if HAS_TPU else params,
            **options,
        ),
        # In interpret mode a donated cache would be copied all the same.
        donate_argnums=(3,) if HAS_TPU and update_kv_cache else (),
        compiler_options=None if HAS_TPU else _quick_compilation(),
    )
