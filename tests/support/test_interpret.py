"""The checks of interpret mode can fail: a kernel that is wrong is found out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import vector_clock
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.conftest import HAS_TPU
from tests.support import interpret

pytestmark = pytest.mark.skipif(HAS_TPU, reason="about interpret mode only")


def _doubled(x, *, read_before_wait: bool):
    """2 * x by way of VMEM."""

    def kernel(x_hbm, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_hbm, buffer, semaphore)
        copy.start()
        if not read_before_wait:
            copy.wait()
        out_ref[...] = 2 * buffer[...]
        if read_before_wait:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
        interpret=interpret.INTERPRET_PARAMS,
    )(x)


def test_a_copy_that_is_awaited_is_no_race():
    x = jnp.ones((8, 128))
    with interpret.checked_interpret_mode():
        out = np.asarray(_doubled(x, read_before_wait=False))
    np.testing.assert_array_equal(out, 2.0)


def test_reading_a_buffer_before_the_wait_is_a_race():
    x = jnp.ones((8, 128))
    with (
        pytest.raises(AssertionError, match="data race"),
        interpret.checked_interpret_mode(),
    ):
        np.asarray(_doubled(x, read_before_wait=True))


def test_a_copy_that_nobody_awaits_is_found():
    x = jnp.ones((8, 128))

    def kernel(x_hbm, out_ref, buffer, semaphore):
        pltpu.make_async_copy(x_hbm, buffer, semaphore).start()
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"),
    )
    with (
        pytest.raises(AssertionError, match="non-zero count"),
        interpret.checked_interpret_mode(),
    ):
        np.asarray(call(x))


def test_the_order_of_clocks_is_that_of_jax():
    rng = np.random.default_rng(0)
    for x, y in rng.integers(0, 3, (200, 2, 2)):
        assert interpret.are_ordered(x, y) == vector_clock.ordered(x, y)


def test_checking_something_that_never_ran_fails():
    with (
        pytest.raises(AssertionError, match="nothing ran"),
        interpret.checked_interpret_mode(),
    ):
        pass
