"""Bridges: the ways from torch's operator to the JAX functions.

A bridge serves one torch device type, such as ``"xla"``, with one framework, such as
torch_xla. It is a module of this package that defines what :class:`Bridge` lists, and
an entry of ``BRIDGES`` that names it. Nothing else in ``torch_rpa`` knows which bridges
there are: the operator and ``impl=`` find theirs here, models and servers through
:mod:`torch_rpa.devices`. Two rooms are for all bridges: ``lowering`` has what they need
of JAX, ``interpret`` runs the kernel on CPU tensors, without any bridge.

A bridge is imported by the first call on a tensor of its device, or when the device is
opened, so that ``import torch_rpa`` needs torch alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    # The command line asks which devices there are before it waits for torch; the room
    # of lowering imports the rooms of options, which need no bridge.
    import torch

    from torch_rpa.bridges.lowering import Target


@runtime_checkable
class Bridge(Protocol):
    """What the module of a bridge defines."""

    def call(
        self,
        tensors: Sequence[torch.Tensor | None],
        options: dict[str, Any],
        *,
        donate_kv_cache: bool = False,
    ) -> Sequence[torch.Tensor]:
        """Computes the attention, or adds it to the framework's graph.

        The bridge validates shapes, dtypes and devices, and the values as well if
        ``validation.values_requested()``.

        Args:
            tensors: Those of :class:`torch_rpa.validation.Inputs`, in its order;
                trailing ones may be left out.
            options: Keyword arguments of the operator, checked by
                :func:`torch_rpa.options.make_options`; defaults may be left out. What
                is compiled depends on all of them and on the tuned records in force:
                :func:`torch_rpa.bridges.lowering.call_signature` is a key of it.
            donate_kv_cache: Whether the buffer of the cache may become that of the new
                cache, because the caller overwrites the old one.

        Returns:
            ``[out]``, then the logarithms if ``return_lse`` is among the options, then
            the new cache unless it is not updated.
        """
        ...

    def donates(self, kv_cache: torch.Tensor) -> bool:
        """Whether a call should be told that its caller overwrites this cache.

        Asked for calls that run at once or are recorded, and while ``torch.compile``
        traces one; in the graph that it makes of them the cache is donated anyway.
        False if the framework finds out by itself. Warns of a cache that the framework
        cannot update in place.
        """
        ...

    def before_compiling(self) -> None:
        """Told while ``torch.compile`` traces a graph that holds the operator.

        That is before the framework looks for a program that it kept of the graph. What
        it sees there is the public operator, so the bridge says which kernel is meant.
        """
        ...

    def update_in_place(self, kv_cache: torch.Tensor, new_cache: torch.Tensor) -> None:
        """Makes the result of a call the value of the cache, without a copy if it can.

        Outside of a graph of ``torch.compile``; there, the operator does it.
        """
        ...

    def reference(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside the block calls on the device take the plain computation."""
        ...

    def open_device(self, device: torch.device) -> torch.device:
        """Opens a device before JAX can, and returns it with its index.

        Args:
            device: Of the bridge's type; without an index, any.

        Raises:
            ValueError: There is no such device.
        """
        ...

    def target(self, device: torch.device) -> Target:
        """Returns what calls on an open device are lowered for."""
        ...

    def buffer_address(self, tensor: torch.Tensor) -> int | None:
        """Returns where a tensor that is not pending is in the memory of its device.

        None if the framework does not tell.
        """
        ...

    def sync(self, *, wait: bool = False) -> None:
        """Starts all that is pending; ``wait`` also waits until it has been computed.

        Does nothing where each call runs at once, unless ``wait`` is True.
        """
        ...

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what to call instead of a function of static shapes.

        Its graph, as the framework compiles it, or the function itself where the
        framework compiles whatever is called.
        """
        ...

    def num_compilations(self) -> int:
        """Returns how many programs this process has compiled for the device so far."""
        ...

    def keep_programs(self, directory: str) -> None:
        """Keeps programs that are compiled from now on, for later processes too.

        Args:
            directory: Where to keep them; it may be that of another process.

        Raises:
            NotImplementedError: The device cannot load programs.
            RuntimeError: It is too late: something was compiled already.
        """
        ...

    def multiply_in_float32(self) -> None:
        """Makes products of float32 matrices as exact as float32, from now on."""
        ...


class Entry(NamedTuple):
    """Where a bridge is.

    Attributes:
        module: Defines what :class:`Bridge` lists.
        framework: The package whose tensors it takes.
        extra: Of this package; it installs the framework and a torch that fits.
        torch_releases: The first and the last release of torch that fit the framework,
            such as ``(2, 9)``. With another one its import fails, in words of its own.
            None if any fits.
        release: The releases that were tried, as ``(2, 9)``. None if any fits.
        libtpu_releases: The first and the last release of libtpu that fit it with the
            JAX of the extra. None if any fits.
        own_pair: The JAX and the libtpu that it asks for by itself, where they are
            older than those of the extra.
        platform_variable: Names the platform of its devices in the environment.
    """

    module: str
    framework: str
    extra: str
    torch_releases: tuple[tuple[int, int], tuple[int, int]] | None = None
    release: tuple[int, ...] | None = None
    libtpu_releases: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    own_pair: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    platform_variable: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the framework is there, for this torch or for another one."""
        return importlib.util.find_spec(self.framework) is not None

    def problem(self) -> str | None:
        """Returns why the framework cannot be used and what to install, else None."""
        remedy = (
            f"install the extra {self.extra} of this package, by "
            f"pip install 'torch-rpa[{self.extra}]' or, in a checkout, "
            f"pip install '.[{self.extra}]'"
        )
        if not self.is_installed:
            return f"{self.framework}, which is not installed: {remedy}"
        if self.torch_releases is None:
            return None
        if self.torch_releases[0] <= _installed_torch() <= self.torch_releases[1]:
            return None
        first, last = (f"{major}.{minor}" for major, minor in self.torch_releases)
        fitting = first if first == last else f"{first} to {last}"
        return (
            f"a torch that fits {self.framework} {_version(self.framework)}, which is "
            f"torch {fitting}, got torch {_torch_version()}: {remedy}, in an "
            "environment of its own"
        )


def _torch_version() -> str:
    import torch

    return torch.__version__


def _installed_torch() -> tuple[int, int]:
    major, minor = _torch_version().split(".")[:2]
    return int(major), int(minor)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown release"  # on the path, but not installed


# By type of torch device. The first one that can be used is the usual device. The
# extras of pyproject.toml have the same releases.
BRIDGES: dict[str, Entry] = {
    "xla": Entry(
        "torch_rpa.bridges.torch_xla",
        framework="torch_xla",
        extra="xla",
        torch_releases=((2, 9), (2, 9)),
        release=(2, 9),
        libtpu_releases=((0, 0, 42), (0, 0, 52)),
        own_pair=((0, 7, 1), (0, 0, 21)),
        platform_variable="PJRT_DEVICE",
    ),
    "tpu": Entry(
        "torch_rpa.bridges.torch_tpu",
        framework="torch_tpu",
        extra="torchtpu",
        torch_releases=((2, 11), (2, 15)),
        release=(0, 2),
        libtpu_releases=((0, 0, 50), (0, 0, 52)),
    ),
}


_loaded: dict[str, Bridge] = {}


def find(device_type: str) -> Bridge | None:
    """Returns the bridge of a device type, or None if it has none, as the CPU.

    Raises:
        ValueError: Its framework is not installed, or does not fit the installed torch.
    """
    entry = BRIDGES.get(device_type)
    if entry is None:
        return None
    bridge = _loaded.get(entry.module)  # each call comes here three times
    if bridge is None:
        problem = entry.problem()
        if problem is not None:
            raise ValueError(f"device {device_type!r} needs {problem}")
        bridge = cast(Bridge, importlib.import_module(entry.module))
        _loaded[entry.module] = bridge
    return bridge
