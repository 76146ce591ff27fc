"""Measures calls in the framework of its environment, a round at a time.

:mod:`benchmarks.host` runs one such process for each environment, and gives them turns.
A process says on its standard output, in lines of JSON, what it is. Then it answers
each line of its input, the way and the number of steps of a round, with seconds.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import importlib.util
import json
import os
import random
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple
from unittest import mock

from benchmarks import environment

# Small, so that the host and not the computation is measured.
NUM_SEQUENCES, PAGES, PAGE_SIZE, MAX_TOKENS = 4, 4, 16, 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128
SM_SCALE = HEAD_DIM**-0.5
WARM_UP = 2  # the first step compiles, the second fills caches of the framework


class Framework(NamedTuple):
    """A framework and how it is measured.

    Attributes:
        package: That is imported.
        device: Type of its devices in torch.
        compiler: Its backend of ``torch.compile``.
        ways: Of calling the operator: keys of ``WAYS``.
    """

    package: str
    device: str
    compiler: str
    ways: tuple[str, ...]


FRAMEWORKS = (
    Framework("torch_xla", "xla", "openxla", ("operator", "function", "compiled")),
    Framework(
        "torch_tpu",
        "tpu",
        "tpu",
        ("operator", "function", "compiled", "through jax_op", "jax_op alone"),
    ),
)


class NoDevice(Exception):
    """There is nothing to measure in this environment."""


# ---- one step


def random_lengths(generator: random.Random) -> list[tuple[int, int]]:
    """(q_len, kv_len) of one step: some decodes, then perhaps a prefill."""
    longest = PAGES * PAGE_SIZE
    num_decodes = generator.randint(1, NUM_SEQUENCES - 1)
    lengths = [(1, generator.randint(1, longest)) for _ in range(num_decodes)]
    if generator.random() < 0.5:
        q_len = generator.randint(2, MAX_TOKENS - num_decodes)
        lengths.append((q_len, generator.randint(q_len, longest)))
    return lengths


def metadata_rows(lengths: list[tuple[int, int]]) -> tuple[list[int], ...]:
    """kv_lens [S], cu_q_lens [S + 1] and distribution [3] of one step."""
    padding = NUM_SEQUENCES - len(lengths)
    kv_lens = [kv_len for _, kv_len in lengths] + [0] * padding
    starts = [0]
    for q_len, _ in lengths:
        starts.append(starts[-1] + q_len)
    num_decodes = sum(q_len == 1 for q_len, _ in lengths)
    distribution = [num_decodes, num_decodes, len(lengths)]
    return kv_lens, starts + starts[-1:] * padding, distribution


class Steps:
    """Steps of a model of attention only, whose lengths change each time.

    Attributes:
        device: That they run on.
        num_compilations: Programs compiled by the framework since the start.
    """

    def __init__(self, device: Any, num_layers: int) -> None:
        import torch

        import torch_rpa
        from torch_rpa import devices

        self.device = device
        self._sync = lambda: devices.sync(device, wait=True)
        self._count = lambda: devices.num_compilations(device)

        def random_tensor(heads: int) -> Any:
            return torch.randn(MAX_TOKENS, heads, HEAD_DIM, dtype=torch.bfloat16).to(
                device
            )

        num_pages = NUM_SEQUENCES * PAGES
        shape = (num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        self._q, self._k, self._v = map(random_tensor, (HEADS, KV_HEADS, KV_HEADS))
        self._caches = [
            torch_rpa.empty_kv_cache(*shape, dtype=torch.bfloat16).to(device)
            for _ in range(num_layers)
        ]
        self._table = torch.arange(num_pages, dtype=torch.int32).to(device)
        self._batches = self._random_batches(torch)

    def _random_batches(self, torch: types.ModuleType) -> Iterator[list]:
        """Metadata of the steps, the same in every run."""
        generator = random.Random(0)
        while True:
            rows = metadata_rows(random_lengths(generator))
            yield [torch.tensor(row, dtype=torch.int32).to(self.device) for row in rows]

    @property
    def num_compilations(self) -> int:
        return self._count()

    def step(self, attend: Callable) -> Callable:
        """A function of a batch that calls ``attend`` in each layer."""
        caches, k, v, table = self._caches, self._k, self._v, self._table

        def layers(q: Any, kv_lens: Any, cu_q_lens: Any, distribution: Any) -> Any:
            for kv_cache in caches:
                q = attend(q, k, v, kv_cache, kv_lens, table, cu_q_lens, distribution)
            return q

        return layers

    def time(self, step: Callable) -> tuple[float, float]:
        """Seconds until a step returns, and until all of it is computed."""
        batch = next(self._batches)
        self._sync()
        start = time.perf_counter()
        result = step(self._q, *batch)
        called = time.perf_counter() - start
        self._sync()
        del result
        return called, time.perf_counter() - start


# ---- ways of calling the operator


def _operator(steps: Steps, compiler: str) -> Callable:
    """``torch.ops``, in the mode that the framework has of itself."""
    return steps.step(_public_operator(SM_SCALE))


def _function(steps: Steps, compiler: str) -> Callable:
    """The documented function."""
    import torch_rpa

    def attend(*tensors: Any) -> Any:
        return torch_rpa.ragged_paged_attention(*tensors, sm_scale=SM_SCALE)

    return steps.step(attend)


def _compiled(steps: Steps, compiler: str) -> Callable:
    """``torch.compile`` of the whole step."""
    import torch

    options: dict[str, Any] = {} if compiler == "openxla" else {"dynamic": False}
    step = steps.step(_public_operator(SM_SCALE))
    return torch.compile(step, backend=compiler, **options)


def _through_jax_op(steps: Steps, compiler: str) -> Callable:
    """``torch.ops``, without the short way of ``torch_tpu_launch``."""
    from torch_rpa.bridges import torch_tpu_launch

    def public(operator: Any, inputs: Any) -> Callable:
        return torch_tpu_launch.through(operator)

    # Another scale is another program, for which the bridge keeps another launcher.
    step = steps.step(_public_operator(SM_SCALE / 2))
    with mock.patch.object(torch_tpu_launch, "launcher", public):
        steps.time(step)
    return step


def _jax_op_alone(steps: Steps, compiler: str) -> Callable:
    """TorchTPU's own operator of the JAX function, without the one of this package."""
    import jax
    import torch

    from jax_kernels.ragged_paged_attention import ragged_paged_attention
    from torch_rpa.bridges import torch_tpu
    from torch_rpa.validation import Inputs

    names = [name for name in Inputs._fields if name not in Inputs._field_defaults]

    def attention(q, k, v, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
        batch = kv_lens, page_indices, cu_q_lens, distribution
        return ragged_paged_attention(
            q, k, v, kv_cache, *batch, sm_scale=SM_SCALE, chip=torch_tpu.chip()
        )

    annotations: dict[str, Any] = dict.fromkeys(names, jax.Array)
    annotations["return"] = tuple[jax.Array, jax.Array]
    attention.__annotations__ = annotations
    operator = torch.tpu.pallas.jax_op(  # pyright: ignore[reportAttributeAccessIssue]
        "rpa_benchmarks::attention", attention, donate_argnums=[3]
    )

    def attend(q: Any, k: Any, v: Any, kv_cache: Any, *batch: Any) -> Any:
        out, new_cache = operator(q, k, v, kv_cache, *batch)
        kv_cache.copy_(new_cache)
        return out

    return steps.step(attend)


def _public_operator(sm_scale: float) -> Callable:
    import torch

    attend = torch.ops.rpa.ragged_paged_attention

    def call(*tensors: Any) -> Any:
        return attend(*tensors, sm_scale=sm_scale)

    return call


WAYS: dict[str, Callable[[Steps, str], Callable]] = {
    "operator": _operator,
    "function": _function,
    "compiled": _compiled,
    "through jax_op": _through_jax_op,
    "jax_op alone": _jax_op_alone,
}


# ---- the process


def open_device(compile_only: str | None) -> tuple[Framework, Any, str]:
    """Opens the device of the framework that is installed.

    Args:
        compile_only: The chip of a compile-only TPU, which TorchTPU is given.

    Returns:
        The framework, the device, and what it is in words.

    Raises:
        NoDevice: There is no framework here, or TorchTPU has no TPU.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for framework in FRAMEWORKS:
        if importlib.util.find_spec(framework.package) is not None:
            break
    else:
        names = " nor ".join(f.package for f in FRAMEWORKS)
        raise NoDevice(f"neither {names} is installed for {sys.executable}")
    if framework.package == "torch_xla":
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        chip = f"host, XLA {os.environ['PJRT_DEVICE']} device"
    elif compile_only is None:
        chip = "host, TPU"
    else:
        chip = f"host, compile-only {compile_only}"
        _open_compile_only_tpu(compile_only)
    from torch_rpa import devices

    try:
        return framework, devices.open_device(framework.device), chip
    except ValueError as error:
        raise NoDevice(
            f"{error}. In a checkout, --compile-only v6e measures without one"
        ) from error


def _open_compile_only_tpu(chip: str) -> None:
    """Gives this process the TPU of the tests: it compiles, and computes zeros."""
    try:
        compile_only_tpu = importlib.import_module("tests.support.compile_only_tpu")
    except ImportError as error:
        raise NoDevice(
            "--compile-only needs the tests of a checkout: run in its root"
        ) from error
    reason = compile_only_tpu.reason_to_skip()
    if reason is not None:
        raise NoDevice(f"--compile-only: {reason}")
    record = tempfile.mkdtemp(prefix="rpa-host-")
    atexit.register(shutil.rmtree, record, ignore_errors=True)
    os.environ.update(compile_only_tpu.environment(chip, record))
    compile_only_tpu.open_tpu()


def serve(
    requests: IO[str], answers: IO[str], num_layers: int, compile_only: str | None
) -> None:
    """Says what is measured here, then answers each request with a round."""
    framework, device, chip = open_device(compile_only)
    described = environment.describe(chip)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(
        {
            "framework": framework.package,
            "environment": described,
            "ways": framework.ways,
        }
    )
    steps = Steps(device, num_layers)
    prepared: dict[str, Callable] = {}
    for line in requests:
        request = json.loads(line)
        way = request["way"]
        before = steps.num_compilations
        if way not in prepared:
            prepared[way] = WAYS[way](steps, framework.compiler)
            for _ in range(WARM_UP):
                steps.time(prepared[way])
        warm = steps.num_compilations
        times = [steps.time(prepared[way]) for _ in range(request["steps"])]
        calls, whole = (list(column) for column in zip(*times, strict=True))
        answer(
            {
                "calls": [seconds / num_layers for seconds in calls],
                "steps": whole,
                "compilations": [warm - before, steps.num_compilations - warm],
            }
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.host_worker")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--compile-only", metavar="CHIP")
    options = parser.parse_args()
    # What libraries print shall not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, answers, options.layers, options.compile_only)
    except NoDevice as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()
        return 2
    return 0
