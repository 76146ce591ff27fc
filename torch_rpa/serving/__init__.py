"""Continuous batching over ragged paged attention."""

from torch_rpa.serving.async_engine import AsyncEngine as AsyncEngine
from torch_rpa.serving.detokenizer import Detokenizer as Detokenizer
from torch_rpa.serving.engine import Engine as Engine
from torch_rpa.serving.logprobs import Logprob as Logprob
from torch_rpa.serving.metrics import PrometheusMetrics as PrometheusMetrics
from torch_rpa.serving.options import EngineOptions as EngineOptions
from torch_rpa.serving.outputs import GenerationOutput as GenerationOutput
from torch_rpa.serving.outputs import RequestStatus as RequestStatus
from torch_rpa.serving.outputs import RequestUpdate as RequestUpdate
from torch_rpa.serving.sampling_params import SamplingParams as SamplingParams
from torch_rpa.serving.sampling_params import (
    StructuredOutputsParams as StructuredOutputsParams,
)
from torch_rpa.serving.stats import EngineStats as EngineStats
from torch_rpa.serving.stats import StepRecord as StepRecord

__all__ = [
    "AsyncEngine",
    "Detokenizer",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "GenerationOutput",
    "Logprob",
    "PrometheusMetrics",
    "RequestStatus",
    "RequestUpdate",
    "SamplingParams",
    "StepRecord",
    "StructuredOutputsParams",
]
