"""The checks of interpret mode can fail: a kernel that is wrong is found out."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.conftest import HAS_TPU
from tests.support import interpret, interpreter

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(HAS_TPU, reason="about interpret mode only"),
]


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


def _copied(x, *, num_waits: int, mode: interpret.CopyTime):
    """Zeros, after two copies to VMEM of which some are awaited."""

    def kernel(x_hbm, out_ref, buffers, semaphores):
        copies = [
            pltpu.make_async_copy(x_hbm, buffers.at[i], semaphores.at[i])
            for i in range(2)
        ]
        for copy in copies:
            copy.start()
        for copy in copies[:num_waits]:
            copy.wait()
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[
            pltpu.VMEM((2, *x.shape), x.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        interpret=dataclasses.replace(
            interpret.INTERPRET_PARAMS, dma_execution_mode=mode
        ),
    )(x)


NEVER_AWAITED = {
    "on_wait": r"never awaited: .*test_interpret\.py",
    "eager": "is left with a non-zero count",
}


@pytest.mark.parametrize("num_waits", [0, 1])
@pytest.mark.parametrize("mode, message", NEVER_AWAITED.items())
def test_a_copy_that_nobody_awaits_is_found(num_waits, mode, message):
    x = jnp.ones((8, 128))
    with (
        pytest.raises(AssertionError, match=message) as caught,
        interpret.checked_interpret_mode(),
    ):
        np.asarray(_copied(x, num_waits=num_waits, mode=mode))
    assert len(re.findall(message, str(caught.value))) == 2 - num_waits


@pytest.mark.parametrize("mode", NEVER_AWAITED)
def test_copies_that_are_all_awaited_are_right(mode):
    with interpret.checked_interpret_mode():
        np.asarray(_copied(jnp.ones((8, 128)), num_waits=2, mode=mode))


def test_a_signal_that_nobody_awaits_is_found():
    def kernel(out_ref, semaphore):
        pl.semaphore_signal(semaphore, 3)
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.SemaphoreType.REGULAR],
        interpret=interpret.INTERPRET_PARAMS,
    )
    with (
        pytest.raises(AssertionError, match=r"non-zero count: \[3\]"),
        interpret.checked_interpret_mode(),
    ):
        np.asarray(call())


def test_a_kernel_is_judged_even_if_a_right_one_follows():
    x = jnp.ones((8, 128))
    with (
        pytest.raises(AssertionError, match="data race"),
        interpret.checked_interpret_mode(),
    ):
        np.asarray(_doubled(x, read_before_wait=True))
        np.asarray(_doubled(x, read_before_wait=False))


def test_the_order_of_clocks_is_that_of_jax():
    rng = np.random.default_rng(0)
    for x, y in rng.integers(0, 3, (200, 2, 2)):
        expected = interpreter.ordered_by_jax(x, y)
        assert interpreter.are_ordered(x, y) == expected


def test_checking_something_that_never_ran_fails():
    with (
        pytest.raises(AssertionError, match="nothing ran"),
        interpret.checked_interpret_mode(),
    ):
        pass
