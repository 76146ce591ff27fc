"""Compiles torch_xla's graphs for a TPU, on a machine that has none."""

from __future__ import annotations

import re

import numpy as np
import torch
import torch_xla

from jax_kernels import chips


class CompiledGraph:
    """What the TPU compiler made of a graph.

    Attributes:
        text: The optimised HLO.
        memory: Its memory statistics, in bytes.
    """

    def __init__(self, executable) -> None:
        (module,) = executable.hlo_modules()
        self.text = module.to_string()
        self.memory = executable.get_compiled_memory_stats()

    @property
    def num_aliased_parameters(self) -> int:
        """Parameters whose buffer an output takes over."""
        header = self.text.split("\n", 1)[0]
        aliases = re.search(r"input_output_alias={(.*?) }, entry", header)
        return aliases.group(1).count("-alias)") if aliases else 0

    @property
    def kernel_calls(self) -> list[str]:
        """The lines that call a Pallas kernel."""
        return [line for line in self.text.splitlines() if "tpu_custom_call" in line]

    @property
    def collectives(self) -> dict[str, list[str]]:
        """The operations between devices, by kind: the shapes of their results."""
        pattern = re.compile(
            r"= (.*?) ((?:all-|reduce-scatter|collective-)[\w\-]*?)(?:-start)?\("
        )
        found: dict[str, list[str]] = {}
        for match in filter(None, map(pattern.search, self.text.splitlines())):
            if not match.group(2).endswith("-done"):
                found.setdefault(match.group(2), []).append(match.group(1))
        return found

    def operations_producing(self, shape: str) -> list[str]:
        """Names of the operations, fused ones too, whose result has this shape.

        Args:
            shape: Such as "bf16[64,4,4,2,128]".
        """
        pattern = re.compile(rf"= {re.escape(shape)}\S* ([\w\-]+)\(")
        return [m.group(1) for m in map(pattern.search, self.text.splitlines()) if m]


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
