"""Timing simulation of TPU TensorCore programs from compiler text dumps."""

from benchmarks.tpu_timing.dma import DmaModel
from benchmarks.tpu_timing.loader import load_kernel
from benchmarks.tpu_timing.machine import Machine, simulate
from benchmarks.tpu_timing.program import Program
from benchmarks.tpu_timing.result import Result
from benchmarks.tpu_timing.scalar_memory import SimulationError
from benchmarks.tpu_timing.stale_reads import find_stale_reads

__all__ = [
    "DmaModel",
    "Machine",
    "Program",
    "Result",
    "SimulationError",
    "find_stale_reads",
    "load_kernel",
    "simulate",
]
