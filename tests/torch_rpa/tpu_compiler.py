"""Compiles torch_xla's graphs for a TPU, on a machine that has none."""

from __future__ import annotations

import re

import torch
import torch_xla

TOPOLOGIES = {"tpu7x": "tpu7x:2x2x1", "v6e": "v6e:2x2"}


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


def compile_for_tpu(hlo_proto: bytes, chip: str, donated_shape: str) -> CompiledGraph:
    """Compiles a graph for one chip with libtpu.

    torch_xla adds its aliases when it compiles, so they are not in the proto. The
    parameters of the cache's shape are donated here; that torch_xla donates them too is
    what test_xla_in_place.py shows.

    Args:
        hlo_proto: From :func:`graph_of`.
        chip: A key of ``TOPOLOGIES``.
        donated_shape: Shape of the parameters to donate, as "64x4x4x2x128xbf16".
    """
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies
    from jaxlib import _jax, xla_client

    computation = xla_client.XlaComputation(hlo_proto)
    text = _jax.mlir.xla_computation_to_mlir_module(computation)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    )
    device = topology.devices[0]
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        _donate(ir, module, f"tensor<{donated_shape}>")
        executable = device.client.compile(
            module, _jax.DeviceList((device,)), xla_client.CompileOptions()
        )
    return CompiledGraph(executable)


def _donate(ir, module, donated_type: str) -> None:
    """Marks the parameters of a type as donated."""
    (main,) = (
        operation
        for operation in module.body.operations
        if operation.attributes["sym_name"].value == "main"
    )
    marked, unmarked = (
        ir.DictAttr.get({"jax.buffer_donor": ir.BoolAttr.get(True)}),
        ir.DictAttr.get({}),
    )
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [marked if str(t) == donated_type else unmarked for t in main.type.inputs]
    )
