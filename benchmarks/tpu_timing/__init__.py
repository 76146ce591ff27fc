"""Timing simulation of TPU TensorCore programs from compiler text dumps."""

from benchmarks.tpu_timing.dma import DmaModel
from benchmarks.tpu_timing.machine import Machine, Result, SimulationError, simulate
from benchmarks.tpu_timing.program import (
    Program,
    find_stale_reads,
    load_kernel,
    load_listing,
)

__all__ = [
    "DmaModel",
    "Machine",
    "Program",
    "Result",
    "SimulationError",
    "find_stale_reads",
    "load_kernel",
    "load_listing",
    "simulate",
]
