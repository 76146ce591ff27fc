"""Runs the kernel: on a TPU for real, elsewhere in Pallas TPU interpret mode.

This is the one place that knows the difference. Interpret mode simulates the memories,
the DMAs and the semaphores. It fills fresh memory with NaN, carries out a DMA only when
somebody waits for it, and follows every access with a happens-before race detector.
"""

import contextlib
import functools
import gc
import io
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call, vector_clock
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention import BlockSizes, ragged_paged_attention
from tests.conftest import HAS_TPU
from tests.support import numerics, ragged_batches

# Small, so that short sequences cross many boundaries.
SMALL_BLOCKS = BlockSizes(decode_block_kv=32, block_q=32, block_kv=32)

MAX_PROGRAMS = 8

INTERPRET_PARAMS = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def run_kernel(
    arguments: tuple, *, block_sizes: BlockSizes = SMALL_BLOCKS, **options
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the kernel and checks how it behaved.

    Calls with the same shapes and options share one compilation.

    Args:
      arguments: ``RaggedBatch.jax_arguments``, or the same with changes.
      block_sizes: Tile sizes.
      **options: Keyword arguments of ``ragged_paged_attention``.

    Returns:
      The output and the cache.

    Raises:
      AssertionError: A data race, or a semaphore that was left signalled.
    """
    function = _jitted(block_sizes=block_sizes, **options)
    with contextlib.nullcontext() if HAS_TPU else checked_interpret_mode():
        out, kv_cache = function(*arguments)
        return np.asarray(out), np.asarray(kv_cache)


def assert_kernel_matches_oracle(
    batch: ragged_batches.RaggedBatch,
    *,
    block_sizes: BlockSizes = SMALL_BLOCKS,
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
    out, kv_cache = run_kernel(arguments, block_sizes=block_sizes, **options)
    assert out.dtype == options.get("out_dtype", batch.queries.dtype)
    changes_result = {
        name: value
        for name, value in options.items()
        if name not in ("out_dtype", "chunk_prefill_size", "chip")
    }
    numerics.assert_matches_oracle(out, kv_cache, batch.arguments, **changes_result)
    return out, kv_cache


@contextlib.contextmanager
def checked_interpret_mode():
    """Fails when what runs within, in interpret mode, has a race or leaves a signal."""
    printed = io.StringIO()
    interpret_pallas_call.reset_tpu_interpret_mode_state()
    try:
        # The interpreter prints what it finds.
        with (
            contextlib.redirect_stdout(printed),
            mock.patch.object(vector_clock, "ordered", are_ordered),
        ):
            yield
        races = interpret_pallas_call.races
        assert races is not None, "nothing ran in interpret mode"
        assert not races.races_found, f"data race:\n{printed.getvalue()[:4000]}"
        assert "non-zero count" not in printed.getvalue(), printed.getvalue()
    finally:
        interpret_pallas_call.reset_tpu_interpret_mode_state()


def are_ordered(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether one vector clock happened before the other.

    The same as ``vector_clock.ordered``, which takes four numpy reductions for two
    numbers. It is asked about every earlier access, and took most of the time.
    """
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    is_less = any(a < b for a, b in pairs)
    is_more = any(a > b for a, b in pairs)
    return is_less != is_more


def forget_old_programs() -> None:
    """Frees compiled programs once there are some; for use between tests.

    A program in interpret mode takes about a thousand memory maps. A process may have
    65,530, and then the compiler crashes.
    """
    if _jitted.cache_info().currsize >= MAX_PROGRAMS:
        _jitted.cache_clear()
        jax.clear_caches()
        gc.collect()


@functools.cache
def _jitted(**options):
    update_kv_cache = options.get("update_kv_cache", True)
    return jax.jit(
        functools.partial(
            ragged_paged_attention,
            interpret=False if HAS_TPU else INTERPRET_PARAMS,
            **options,
        ),
        # In interpret mode a donated cache would be copied all the same.
        donate_argnums=(3,) if HAS_TPU and update_kv_cache else (),
        # Each program runs once or twice, and compiling it is most of the time.
        compiler_options=None if HAS_TPU else {"xla_backend_optimization_level": 0},
    )
