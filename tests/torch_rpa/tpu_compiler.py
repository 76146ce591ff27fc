"""Compiles torch_xla's graphs for a TPU, on a machine that has none."""

from __future__ import annotations

import numpy as np
import torch
import torch_xla

from jax_kernels import chips
from tests.support.optimised_hlo import OptimisedHlo


class CompiledGraph(OptimisedHlo):
    """What the TPU compiler made of a graph.

    Attributes:
        memory: Its memory statistics, in bytes.
    """

    def __init__(self, executable) -> None:
        (module,) = executable.hlo_modules()
        super().__init__(module.to_string())
        self.memory = executable.get_compiled_memory_stats()


def graph_of(outputs: list[torch.Tensor]) -> bytes:
    """Returns the HLO module torch_xla would compile for these tensors."""
    return torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs)


def compile_for_tpu(
    hlo_proto: bytes, chip: str, donated_shape: str, num_partitions: int = 1
) -> CompiledGraph:
    """Compiles a graph with libtpu.

    torch_xla adds its aliases when it compiles, so they are not in the proto. The
    parameters of the cache's shape are donated here; that torch_xla donates them too is
    what test_xla_in_place.py shows.

    Args:
        hlo_proto: From :func:`graph_of`.
        chip: A key of ``chips.COMPILED``.
        donated_shape: Shape of the parameters to donate, as "64x4x4x2x128xbf16".
        num_partitions: Devices of the topology that share a sharded graph.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies
    from jaxlib import xla_client

    computation = xla_client.XlaComputation(hlo_proto)
    text = _jax.mlir.xla_computation_to_mlir_module(computation)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chips.COMPILED[chip].topology
    )
    devices = tuple(topology.devices[:num_partitions])
    options = xla_client.CompileOptions()
    if num_partitions > 1:
        options.num_partitions = num_partitions
        build_options = options.executable_build_options
        build_options.num_partitions = num_partitions
        build_options.use_spmd_partitioning = True
        # As torch_xla sets it; otherwise all outputs would be gathered.
        build_options.allow_spmd_sharding_propagation_to_output = [True]
        build_options.device_assignment = xla_client.DeviceAssignment.create(
            np.array([[device.id for device in devices]])
        )
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        _donate(ir, module, f"tensor<{donated_shape}>")
        executable = devices[0].client.compile(
            module, _jax.DeviceList(devices), options
        )
    return CompiledGraph(executable)


def _donate(ir, module, donated_type: str) -> None:
    """Marks the parameters of a type as donated."""
    (main,) = (
        operation
        for operation in module.body.operations
        if operation.attributes["sym_name"].value == "main"
    )
    donor = {"jax.buffer_donor": ir.BoolAttr.get(True)}
    if "arg_attrs" in main.attributes:  # shardings
        former = [{a.name: a.attr for a in one} for one in main.attributes["arg_attrs"]]
    else:
        former = [{} for _ in main.type.inputs]
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [
            ir.DictAttr.get(attrs | donor if str(t) == donated_type else attrs)
            for attrs, t in zip(former, main.type.inputs, strict=True)
        ]
    )
