"""Times the cases on a real TPU, through the torch operator and through JAX.

    python -m benchmarks.predict --table --json predicted.json
    python -m benchmarks.measure --table --predictions predicted.json --json times.json

Without a TPU this says so and exits with code 2. Only one library at a time may hold a
TPU, so each is timed in a process of its own.

Through JAX, a sample is one program that loops over ``--calls`` calls: host and
dispatch are paid once. Through torch, it is one torch_xla step of ``--calls`` calls, as
in a model of so many layers. Cache contents and page tables are random; every call
rewrites the same new tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

from benchmarks import cases, environment, predict, timing
from benchmarks.tpu_timing import workloads
from jax_kernels import chips

LIBRARIES = ("torch", "jax")
NO_TPU = 2
NO_TPU_MESSAGE = (
    "There is no TPU here, so nothing can be measured.\n"
    "python -m benchmarks.predict needs none."
)


def has_tpu() -> bool:
    """Whether there is a TPU device, found without opening it."""
    # /dev/vfio/vfio is only the driver; a numbered group is a device.
    return pathlib.Path("/dev/accel0").exists() or any(
        path.name.isdigit() for path in pathlib.Path("/dev").glob("vfio/*")
    )


@dataclasses.dataclass(frozen=True)
class Repetition:
    """How often a case is run; see ``timing.time_runs``."""

    warm_up: int
    repeats: int
    calls: int


def scalars_in_fewest_pages(case: cases.Case) -> tuple[int, dict]:
    """Pages that the case needs, and its scalar operands in a cache of that size."""
    page_size = case.shape.page_size
    num_pages = sum(-(-s.kv_len // page_size) for s in case.sequences)
    shape = dataclasses.replace(case.shape.rpa_shape, num_pages=num_pages)
    is_chunked = case.shape.chunk_prefill_size is not None
    operands = workloads.scalar_operands(shape, case.sequences, chunked=is_chunked)
    return num_pages, operands


def time_with_jax(
    case: cases.Case,
    repetition: Repetition,
    attention: Callable | None = None,
) -> tuple[str, timing.Timing]:
    """Times a case; returns the chip, too.

    Args:
      case: What to run.
      repetition: How often.
      attention: By default the kernel.
    """
    import functools

    import jax
    import jax.numpy as jnp

    from jax_kernels.ragged_paged_attention import (
        kv_cache_shape,
        ragged_paged_attention,
    )

    kind = jax.devices()[0].device_kind
    attend = attention or functools.partial(ragged_paged_attention, chip=kind)
    model, shape = case.shape.model, case.shape
    num_pages, scalars = scalars_in_fewest_pages(case)
    cache_shape = kv_cache_shape(
        num_pages,
        shape.page_size,
        model.num_kv_heads,
        model.head_dim,
        jnp.dtype(shape.cache_dtype),
    )
    keys = jax.random.split(jax.random.key(0), 4)

    def tokens(key, num_heads: int) -> jax.Array:
        sizes = (shape.num_tokens, num_heads, model.head_dim)
        return jax.random.normal(key, sizes, jnp.dtype(shape.q_dtype))

    @jax.jit
    def fill(key) -> jax.Array:
        page = jax.random.normal(key, cache_shape[1:]).astype(shape.cache_dtype)
        return jnp.broadcast_to(page, cache_shape)

    queries = tokens(keys[0], model.num_q_heads)
    new = [tokens(key, model.num_kv_heads) for key in keys[1:3]]
    batch = [jnp.asarray(scalars[index]) for index in range(4)]
    sinks = jnp.zeros(model.num_q_heads) if model.with_sinks else None

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def loop(calls: int, kv_cache, queries, new, batch, sinks):
        def body(_, kv_cache):
            arguments = (queries, *new, kv_cache, *batch, sinks)
            return attend(*arguments, **shape.options)[1]

        return jax.lax.fori_loop(0, calls, body, kv_cache)

    state = [fill(keys[3])]

    def run(calls: int) -> None:
        state[0] = loop(calls, state[0], queries, new, batch, sinks)

    return kind, timing.time_runs(
        run, lambda: state[0].block_until_ready(), **vars(repetition)
    )


def time_with_torch(
    case: cases.Case, repetition: Repetition
) -> tuple[str, timing.Timing]:
    """Times a case through ``torch.ops.rpa``; returns the chip, too."""
    import torch
    import torch_xla

    import torch_rpa
    from torch_rpa.bridges import torch_xla as xla_bridge

    device = torch_xla.device()
    model, shape = case.shape.model, case.shape
    num_pages, scalars = scalars_in_fewest_pages(case)
    q_dtype = getattr(torch, shape.q_dtype)

    def tokens(num_heads: int) -> torch.Tensor:
        sizes = (shape.num_tokens, num_heads, model.head_dim)
        return torch.randn(sizes, device=device).to(q_dtype)

    q, k, v = (tokens(n) for n in (model.num_q_heads, *2 * (model.num_kv_heads,)))
    cache_shape = torch_rpa.kv_cache_shape(
        num_pages,
        shape.page_size,
        model.num_kv_heads,
        model.head_dim,
        dtype=getattr(torch, shape.cache_dtype),
    )
    page = torch.randn(cache_shape[1:], device=device)
    page = page.to(getattr(torch, shape.cache_dtype))
    kv_cache = page.expand(cache_shape).contiguous()
    batch = [torch.from_numpy(scalars[index]).to(device) for index in range(4)]
    sinks = torch.zeros(model.num_q_heads, device=device) if model.with_sinks else None
    torch_xla.sync(wait=True)

    def run(calls: int) -> None:
        for _ in range(calls):
            torch.ops.rpa.ragged_paged_attention(
                q, k, v, kv_cache, *batch, sinks, **shape.options
            )
        torch_xla.sync()

    chip = xla_bridge.device_target(device).chip or "unknown"
    return chip, timing.time_runs(
        run, lambda: torch_xla.sync(wait=True), **vars(repetition)
    )


def row(
    case: cases.Case, library: str, kind: str, timed: timing.Timing, predicted: dict
) -> dict:
    """One line of the result.

    Args:
      case: What was run.
      library: Through which.
      kind: Of the device.
      timed: Per call.
      predicted: Microseconds by (case, chip).
    """
    chip = chips.find_chip(kind)
    result = {
        "case": case.name,
        "library": library,
        "chip": chip.name,
        "kind": "measurement",
        **timed.as_dict(),
    }
    if chip.known_rates is not None:
        result |= workloads.utilization(timed.median, chip, case.ideal)
    expected = predicted.get((case.name, chip.name))
    if expected:
        result["ratio_to_prediction"] = 1e6 * timed.median / expected
    return result


def read_predictions(path: str | None) -> dict[tuple[str, str], float]:
    """Microseconds by (case, chip), from the JSON of ``benchmarks.predict``."""
    if path is None:
        return {}
    content = json.loads(pathlib.Path(path).read_text())
    if content.get("kind") != "prediction":
        raise ValueError(
            f"predictions: expected the JSON of benchmarks.predict, got {path}"
        )
    return {(c["case"], c["chip"]): c["microseconds"] for c in content["cases"]}


def print_rows(rows: list[dict]) -> None:
    print("| case | through | median us (deciles) | MBU % | MFU % | to prediction |")
    print("|---|---|---|---|---|---|")
    for line in rows:
        spread = f"{line['low_us']:.1f} to {line['high_us']:.1f}"
        cells = [line["case"], line["library"], f"{line['median_us']:.1f} ({spread})"]
        for name, factor in (("mbu", 100), ("mfu", 100), ("ratio_to_prediction", 1)):
            cells.append(f"{factor * line[name]:.2f}" if name in line else "")
        print("| " + " | ".join(cells) + " |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_case_arguments(parser)
    parser.add_argument("--through", choices=LIBRARIES, help="by default both")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--calls", type=int, default=8, help="in each sample")
    parser.add_argument("--predictions", metavar="FILE", help="of benchmarks.predict")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    options = parser.parse_args(arguments)
    if not has_tpu():
        print(NO_TPU_MESSAGE, file=sys.stderr)
        return NO_TPU
    if sum(map(bool, (options.case, options.table, options.seqs))) != 1:
        parser.error("give exactly one of --case, --table, --seqs")
    if options.through is None:
        rows = _in_processes(arguments if arguments is not None else sys.argv[1:])
    else:
        rows = _in_this_process(options)
    chips = {line["chip"] for line in rows} or {"none"}
    described = environment.describe(", ".join(sorted(chips)))
    if options.json != "-":
        environment.print_header("time of a step, MEASURED", described)
        print_rows(rows)
    if options.json:
        content = {"kind": "measurement", "environment": described, "rows": rows}
        environment.write_json(options.json, content)
    return 0


def _in_this_process(options: argparse.Namespace) -> list[dict]:
    predicted = read_predictions(options.predictions)
    repetition = Repetition(options.warm_up, options.repeats, options.calls)
    time_case = time_with_jax if options.through == "jax" else time_with_torch
    rows = []
    for case in predict.selected_cases(options):
        kind, timed = time_case(case, repetition)
        rows.append(row(case, options.through, kind, timed, predicted))
        print(f"{case.name} through {options.through} done", file=sys.stderr)
    return rows


def _in_processes(arguments: list[str]) -> list[dict]:
    """Runs this module once for each library and joins their rows."""
    rows = []
    for library in LIBRARIES:
        command = [sys.executable, "-m", "benchmarks.measure", *arguments]
        done = subprocess.run(
            [*command, "--through", library, "--json", "-"],
            cwd=environment.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += json.loads(done.stdout)["rows"]
    return sorted(rows, key=lambda line: line["case"])


if __name__ == "__main__":
    sys.exit(main())
