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
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch


@runtime_checkable
class Bridge(Protocol):
    """What the module of a bridge defines.

    Attributes:
        IS_LAZY: Whether calls only build a program, which :meth:`sync` starts. Then all
            calls between two of them are one program. Otherwise each call runs at once.
    """

    IS_LAZY: bool

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
                ``jax_kernels.tuned.token()`` belongs to the key of any cache of it.
            donate_kv_cache: Whether the buffer of the cache may become that of the new
                cache, because the caller overwrites the old one.

        Returns:
            ``[out, new_cache]``, or ``[out]`` if the cache is not updated.
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

    def multiply_in_float32(self) -> None:
        """Makes products of float32 matrices as exact as float32, from now on."""
        ...


class Entry(NamedTuple):
    """Where a bridge is.

    Attributes:
        module: Defines what :class:`Bridge` lists.
        framework: The package whose tensors it takes.
    """

    module: str
    framework: str

    @property
    def is_installed(self) -> bool:
        """Whether the framework can be imported."""
        return importlib.util.find_spec(self.framework) is not None


# By type of torch device. The first one that is installed is the usual device.
BRIDGES: dict[str, Entry] = {
    "xla": Entry("torch_rpa.bridges.torch_xla", framework="torch_xla"),
    "tpu": Entry("torch_rpa.bridges.torch_tpu", framework="torch_tpu"),
}


_loaded: dict[str, Bridge] = {}


def find(device_type: str) -> Bridge | None:
    """Returns the bridge of a device type, or None if it has none, as the CPU."""
    entry = BRIDGES.get(device_type)
    if entry is None:
        return None
    bridge = _loaded.get(entry.module)  # each call comes here three times
    if bridge is None:
        bridge = cast(Bridge, importlib.import_module(entry.module))
        _loaded[entry.module] = bridge
    return bridge
