"""What the compile scripts of peers share; imports JAX and NumPy alone.

The scripts run in environments that have a peer and not this project.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import SingleDeviceSharding

# No kernel reads anything larger as scalars.
MAX_SCALARS = 1 << 20
_LOOPS = {"cond_jaxpr", "body_jaxpr", "branches", "reverse"}


def import_alone(module: str) -> types.ModuleType:
    """A module, without what its outermost package imports first.

    Raises:
      ModuleNotFoundError: The package is not installed.
    """
    name = module.partition(".")[0]
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"{name}: not installed")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
    return importlib.import_module(module)


def device_of(topology: str) -> Any:
    """The first device of a topology, none of which is there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[
        0
    ]


@contextlib.contextmanager
def as_on(device: Any) -> Iterator[None]:
    """Within it JAX names a topology's device as the one that it runs on.

    Peers choose block sizes by the chip that they find.
    """
    with (
        mock.patch.object(jax, "devices", lambda *_: [device]),
        mock.patch.object(jax, "default_backend", lambda: "tpu"),
        jax.default_device(device),
    ):
        yield


def compile_for(device: Any, function: Callable, *arguments: Any, **options) -> None:
    """Compiles a function ahead of time; the compiler's flags make it write its dump.

    Args:
      device: Of a topology.
      function: Traceable by JAX.
      *arguments: Only their shapes and dtypes are used.
      **options: Of ``jax.jit``.
    """
    where = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        arguments,
    )
    with as_on(device):
        jax.jit(function, **options).lower(*shapes).compile()


def array(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
    """An argument whose values do not matter."""
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def write_call(
    directory: Path,
    request: dict,
    kernels: list[tuple[str, dict[int, np.ndarray]]],
    packages: list[str],
) -> None:
    """Writes ``operands.npz`` and ``call.json``.

    Args:
      directory: Where the dump is.
      request: What was asked for.
      kernels: Name and known operands of each kernel, in order of execution.
      packages: Those whose versions are written, besides JAX and libtpu.
    """
    arrays: dict[str, Any] = {
        f"{kernel}:{index}": value
        for kernel, values in kernels
        for index, value in values.items()
    }
    np.savez(directory / "operands.npz", **arrays)
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "libtpu", *packages)
    }
    (directory / "call.json").write_text(
        json.dumps(
            {
                "request": request,
                "kernels": [kernel for kernel, _ in kernels],
                "versions": versions,
            },
            indent=1,
        )
    )


def kernels_of(
    device: Any, function: Callable, *arguments: Any
) -> list[tuple[str, dict[int, np.ndarray]]]:
    """The kernels that a call runs, and the values of their operands as far as known.

    A peer's function computes some operands of its kernels itself, such as the bounds
    of a mask. The function is traced, and what does not depend on large arguments is
    evaluated, so no tensor is allocated and no kernel runs.

    Args:
      device: What the function is traced for.
      function: Traceable by JAX.
      *arguments: NumPy arrays where the values are to be used, ``jax.ShapeDtypeStruct``
        where they are not.

    Returns:
      Name and known operands, by index, of each ``pallas_call``, in order of execution.
      Operands that depend on an argument without values are left out, and so are those
      of more than ``MAX_SCALARS`` elements. Bounds of a dynamic grid are operands, the
      first ones.

    Raises:
      NotImplementedError: A kernel is inside a loop or a branch.
    """
    leaves, tree = jax.tree.flatten(arguments)
    with as_on(device):
        closed = jax.make_jaxpr(lambda *flat: function(*tree.unflatten(flat)))(*leaves)
    known = [
        None if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)
        for leaf in leaves
    ]
    found: list[tuple[str, dict[int, np.ndarray]]] = []
    _evaluate(closed, known, found)
    return found


def _evaluate(closed: Any, arguments: list, found: list) -> list:
    """Values of the outputs of a jaxpr, None where unknown; kernels go to ``found``."""
    jaxpr = closed.jaxpr
    values: dict[Any, np.ndarray | None] = {
        **dict(zip(jaxpr.constvars, closed.consts, strict=True)),
        **dict(zip(jaxpr.invars, arguments, strict=True)),
    }

    def read(variable: Any) -> Any:
        if isinstance(variable, core.Literal):
            return np.asarray(variable.val)
        return values.get(variable)

    for equation in jaxpr.eqns:
        given = [read(variable) for variable in equation.invars]
        results: list = [None] * len(equation.outvars)
        called = _called(equation.params)
        if equation.primitive.name == "pallas_call":
            found.append((_name(equation.params), _scalars(given)))
        elif called is not None:
            results = _evaluate(called, given, found)
        elif "pallas_call" in str(equation.params):
            raise NotImplementedError(
                f"expected kernels outside loops and branches, got one in "
                f"{equation.primitive.name}"
            )
        elif all(value is not None for value in given):
            results = _result(equation, given)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _called(parameters: Mapping[str, Any]) -> Any:
    """What a call-like equation calls with its own operands, or None."""
    if _LOOPS & set(parameters):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if isinstance(parameters.get(key), core.ClosedJaxpr):
            return parameters[key]
    return None


def _result(equation: Any, given: list) -> list:
    arrays = [jnp.asarray(value) for value in given]
    results = equation.primitive.bind(*arrays, **equation.params)
    return results if equation.primitive.multiple_results else [results]


def _name(parameters: Mapping[str, Any]) -> str:
    # JAX 0.8 has it in the debug information only.
    return parameters.get("name") or parameters["jaxpr"].debug_info.func_name


def _scalars(given: list) -> dict[int, np.ndarray]:
    return {
        index: np.asarray(value)
        for index, value in enumerate(given)
        if value is not None and value.size <= MAX_SCALARS
    }
