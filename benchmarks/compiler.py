"""Compiles the kernel for a chip that is not there and keeps the compiler's schedule.

libtpu reads ``LIBTPU_INIT_ARGS`` when it is loaded, so each compilation is a process of
its own: ``python -m benchmarks.compiler DIRECTORY CHIP``, with the static shape and the
block sizes as JSON on its standard input.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import cases, environment
from benchmarks.tpu_timing import Program, load_kernel
from jax_kernels import chips

KERNEL_NAME = "rpa"
# An extreme candidate of the tuner may keep the compiler busy for ever.
MAX_SECONDS = 900
# Of the cache in the program: its schedule is the same for any number of pages, and the
# compiler refuses a cache that exceeds the HBM of the chip.
MAX_PAGES = 1024
# The files of one kernel that the instrument reads. All the others go.
_KEPT = ("packed-bundles-post-ra", "final_bundles", "post-ra", "static-per-bundle-util")


@functools.lru_cache(maxsize=1)
def compile_program(
    shape: cases.StaticShape, chip: str, blocks: tuple[int, int, int] | None = None
) -> Program:
    """Compiles the kernel with libtpu; takes from ten seconds to a minute.

    The last program is kept, for a second look at the same case.

    Args:
      shape: What is compiled.
      chip: For which chip.
      blocks: ``decode_block_kv``, ``block_q`` and ``block_kv``; the defaults if None.

    Raises:
      RuntimeError: The compiler failed; its last words are in the message. Or it took
        more than ``MAX_SECONDS``.
    """
    with tempfile.TemporaryDirectory(prefix="rpa-schedule-") as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.compiler", directory, chip],
                cwd=environment.ROOT,
                env=_child_environment(directory),
                input=json.dumps(
                    {"shape": dataclasses.asdict(shape), "blocks": blocks}
                ),
                capture_output=True,
                text=True,
                timeout=MAX_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"compiling for {chip} took more than {MAX_SECONDS} seconds"
            ) from error
        if done.returncode:
            raise RuntimeError(
                f"compiling for {chip} failed with exit status {done.returncode}:\n"
                + "\n".join(done.stderr.splitlines()[-15:])
            )
        return load_kernel(directory, KERNEL_NAME, chips.COMPILED[chip])


def _child_environment(directory: str) -> dict[str, str]:
    flags = (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
        # All passes would be 300 MB and more, and half of the time.
        f"--xla_jf_dump_llo_pass_label_regex={'|'.join(_KEPT)}"
    )
    return os.environ | {
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        # A program taken from a cache would leave no schedule.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        **chips.COMPILE_ONLY_ENVIRONMENT,
    }


def _compile(
    shape: cases.StaticShape, chip: str, blocks: tuple[int, int, int] | None
) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jax_kernels.ragged_paged_attention import (
        BlockSizes,
        kv_cache_shape,
        ragged_paged_attention,
    )

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chips.COMPILED[chip].topology
    )
    where = SingleDeviceSharding(topology.devices[0])

    def array(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=where)

    model = shape.model
    queries = (shape.num_tokens, model.num_q_heads, model.head_dim)
    tokens = (shape.num_tokens, model.num_kv_heads, model.head_dim)
    cache = kv_cache_shape(
        min(shape.num_pages, MAX_PAGES),
        shape.page_size,
        model.num_kv_heads,
        model.head_dim,
        jnp.dtype(shape.cache_dtype),
    )

    def call(*arguments):
        return ragged_paged_attention(
            *arguments,
            chip=chip,
            block_sizes=BlockSizes(*blocks) if blocks else None,
            **shape.options,
        )

    jax.jit(call, donate_argnums=3).lower(
        array(shape.q_dtype, *queries),
        array(shape.q_dtype, *tokens),
        array(shape.q_dtype, *tokens),
        array(shape.cache_dtype, *cache),
        array("int32", shape.num_sequences),
        array("int32", shape.num_pages),
        array("int32", shape.num_sequences + 1),
        array("int32", 3),
        array("float32", model.num_q_heads) if model.with_sinks else None,
    ).compile()


def _prune(directory: Path) -> None:
    for path in directory.iterdir():
        kept = KERNEL_NAME in path.name and any(part in path.name for part in _KEPT)
        if path.is_dir():
            shutil.rmtree(path)
        elif not kept:
            path.unlink()


def main() -> None:
    directory, chip = sys.argv[1:]
    request = json.load(sys.stdin)
    fields = request["shape"]
    model = cases.Model(**fields.pop("model"))
    _compile(cases.StaticShape(model, **fields), chip, request["blocks"])
    _prune(Path(directory))


if __name__ == "__main__":
    main()
