#!/usr/bin/env bash
# Pallas TPU interpret mode says nothing about a copy that is started and never awaited.
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
#
# Seen: the kernel below starts the copy of its result and forgets to wait for it.
#
#   on_wait: result nan, printed nothing
#   eager: result 1.0, printed "Semaphore 2001 has non-zero count ... 4096"
#
# With `dma_execution_mode="on_wait"`, which is the default, the copy is never carried
# out, and nothing is said. With "eager" it is carried out, and the semaphore that stays
# signalled is printed. Nothing is raised in either mode.
#
# Expected: an error in both modes. A copy that nobody awaits may still be running when
# the kernel ends, and a semaphore that is not zero at the end disturbs the next kernel.
# In the default mode such a copy is only found if a test reads what it should have
# written: a copy into memory that is overwritten later, or never read, goes unnoticed.
#
# Why it matters here: the kernel of this project lives on copies that run ahead, and
# its tests run in this mode. They compare the whole cache as well as the output, run
# phases in "eager" mode too, and fail on the printed words
# (`checked_interpret_mode` in tests/support/interpret.py and its tests).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps jax==0.10.2 jaxlib==0.10.2 \
    ml_dtypes==0.6.0 numpy==2.4.6 opt_einsum==3.4.0 scipy==1.17.1

cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def kernel(x_hbm, out_hbm, buffer, semaphores):
    load = pltpu.make_async_copy(x_hbm, buffer, semaphores.at[0])
    load.start()
    load.wait()
    pltpu.make_async_copy(buffer, out_hbm, semaphores.at[1]).start()


def run(mode):
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[in_hbm],
        out_specs=in_hbm,
        scratch_shapes=[
            pltpu.VMEM((8, 128), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        interpret=pltpu.InterpretParams(dma_execution_mode=mode),
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = np.asarray(call(jnp.ones((8, 128))))
    print(f"{mode}: result {result[0, 0]}, printed {printed.getvalue().strip()!r}")
    return result, printed.getvalue()


assert pltpu.InterpretParams().dma_execution_mode == "on_wait"
result, printed = run("on_wait")
assert np.isnan(result).all() and not printed
result, printed = run("eager")
assert (result == 1).all() and "non-zero count" in printed
EOF
