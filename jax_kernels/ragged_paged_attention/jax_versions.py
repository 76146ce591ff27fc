"""What differs between the releases of JAX that the kernel runs on: 0.7.1 to 0.12.

Each name stands for one difference, and says which releases need it and why. What is
the same in all of them is not here.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.pallas import tpu as pltpu

# Until 0.7.1 there is no operation that rounds two float32 to bfloat16 and packs them
# into one word. Shifts of the bits do the same.
HAS_PACK_ELEMENTWISE = hasattr(pltpu, "pack_elementwise")


@contextlib.contextmanager
def device_named(device_kind: str | None) -> Iterator[None]:
    """Operations traced within are lowered for a device of this kind.

    From 0.11.2 on, the lowering of ``pl.run_scoped`` wants to know the chip. It asks
    the mesh under which the operation was traced and, if that names no device, the
    default device. Where that is a CPU it raises, whatever platform was asked for. A
    mesh that names a device is left alone, and so are its axes in every case.

    Args:
      device_kind: As PJRT reports it; None if unknown: then nothing is named.
    """
    if jax.__version_info__ < (0, 11, 2) or device_kind is None:
        yield
        return
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None or device.platform != "tpu":
        device = jax.sharding.AbstractDevice(
            device_kind=device_kind, num_cores=1, platform="tpu"
        )
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        yield


@contextlib.contextmanager
def byte_code_for_libtpu() -> Iterator[None]:
    """Kernels are lowered within such that the libtpu beside this JAX can read them.

    Only jax 0.7.1 needs it, with libtpu 0.0.21: the pair of torch_xla 2.9.0. Without a
    TPU it writes version 8 of the byte code, and that libtpu reads versions up to 7. On
    a TPU VM it would ask its own default backend for the age of libtpu and, if that is
    a CPU because the TPU belongs to PyTorch, refuse to lower anything.
    """
    if jax.__version_info__ >= (0, 7, 2):
        yield
        return
    from jax._src import cloud_tpu_init, tpu_custom_call

    wanted = (
        (tpu_custom_call, "get_ir_version", lambda ctx: 7),
        (cloud_tpu_init, "running_in_cloud_tpu_vm", False),
    )
    found = [(module, name, getattr(module, name)) for module, name, _ in wanted]
    try:
        for module, name, value in wanted:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
