"""Metrics of an engine for Prometheus, under the names that serving engines use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch_rpa.serving.outputs import GenerationOutput, RequestStatus, RequestUpdate
from torch_rpa.serving.stats import EngineStats, StepRecord

if TYPE_CHECKING:  # an optional package
    from prometheus_client import (  # pyright: ignore[reportMissingImports]
        CollectorRegistry,
    )

# The buckets of vLLM, so that dashboards made for it fit.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
_REASONS = {RequestStatus.CANCELLED: "abort", RequestStatus.FAILED: "error"}


class PrometheusMetrics:
    """Counts what the steps of one engine do; give it to the engine as ``metrics=``.

    ::

        engine = Engine(model, options, metrics=PrometheusMetrics(model_name="llama"))
        prometheus_client.start_http_server(8000)

    The names after the prefix, and the buckets, are those of vLLM. With
    ``prefix="vllm:"`` dashboards that were made for it can be used as they are.
    """

    def __init__(
        self,
        *,
        prefix: str = "torch_rpa:",
        model_name: str = "",
        registry: CollectorRegistry | None = None,
    ):
        """Registers the metrics.

        Args:
            prefix: Comes before every name.
            model_name: Value of the label of that name.
            registry: Where to register; None is the default one of prometheus_client.

        Raises:
            ValueError: prometheus_client is not installed, or the registry has metrics
                of this prefix already.
        """
        client = _import()
        registry = client.REGISTRY if registry is None else registry
        labels = {"model_name": model_name}

        def metric(kind: Any, name: str, text: str, *more: str, **options: Any) -> Any:
            made = kind(
                prefix + name, text, [*labels, *more], registry=registry, **options
            )
            return made if more else made.labels(**labels)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return metric(client.Histogram, name, text, buckets=buckets)

        gauge, counter = client.Gauge, client.Counter
        self._labels = labels
        self._running = metric(
            gauge, "num_requests_running", "Requests that hold pages."
        )
        self._waiting = metric(
            gauge, "num_requests_waiting", "Requests that wait for pages."
        )
        self._cache_usage = metric(
            gauge, "kv_cache_usage_perc", "Part of the pages in use; 1 is all."
        )
        self._preemptions = metric(
            counter, "num_preemptions", "How often a request lost its pages."
        )
        self._prompt_tokens = metric(
            counter, "prompt_tokens", "Prompt tokens of requests with a first token."
        )
        self._generation_tokens = metric(
            counter, "generation_tokens", "Tokens generated."
        )
        self._prefix_queries = metric(
            counter, "prefix_cache_queries", "Prompt tokens looked up in the cache."
        )
        self._prefix_hits = metric(
            counter, "prefix_cache_hits", "Prompt tokens found in the cache."
        )
        self._success = metric(
            counter, "request_success", "Requests that ended.", "finished_reason"
        )
        self._step_tokens = histogram(
            "iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKENS
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens.", _TOKEN_SECONDS
        )
        self._end_to_end = histogram(
            "e2e_request_latency_seconds", "From arrival to end.", _REQUEST_SECONDS
        )
        self._queue = histogram(
            "request_queue_time_seconds", "Until it started.", _REQUEST_SECONDS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "From start to the first token.",
            _REQUEST_SECONDS,
        )
        self._decode = histogram(
            "request_decode_time_seconds",
            "From the first token to the last.",
            _REQUEST_SECONDS,
        )
        self._inference = histogram(
            "request_inference_time_seconds",
            "From start to the last token.",
            _REQUEST_SECONDS,
        )
        self._request_prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _REQUEST_TOKENS
        )
        self._request_generation = histogram(
            "request_generation_tokens", "Tokens it generated.", _REQUEST_TOKENS
        )
        self._num_preemptions = 0

    def observe_load(
        self, *, num_running: int, num_waiting: int, cache_usage: float
    ) -> None:
        """Says how busy the engine is after a step."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._cache_usage.set(cache_usage)

    def observe_step(self, record: StepRecord, stats: EngineStats) -> None:
        """Counts a step."""
        self._step_tokens.observe(record.num_tokens)
        self._preemptions.inc(stats.num_preemptions - self._num_preemptions)
        self._num_preemptions = stats.num_preemptions

    def observe_update(self, update: RequestUpdate) -> None:
        """Counts what a step brought for a request."""
        output, num_new = update.output, len(update.new_tokens)
        times = output.timestamps
        if num_new:
            self._generation_tokens.inc(num_new)
            if num_new == len(times):  # the first ones
                self._prompt_tokens.inc(len(output.prompt_ids))
                self._prefix_queries.inc(len(output.prompt_ids))
                self._prefix_hits.inc(output.num_shared_tokens)
                self._first_token.observe(times[0] - output.created_time)
            for index in range(max(len(times) - num_new, 1), len(times)):
                self._inter_token.observe(times[index] - times[index - 1])
        if update.is_last:
            self._observe_end(output)

    def _observe_end(self, output: GenerationOutput) -> None:
        reason = _REASONS.get(output.status, output.finish_reason)
        self._success.labels(**self._labels, finished_reason=reason).inc()
        start, end = output.lifespan
        self._end_to_end.observe(end - output.created_time)
        self._request_prompt.observe(len(output.prompt_ids))
        self._request_generation.observe(len(output.generated_tokens))
        if output.timestamps:
            first, last = output.timestamps[0], output.timestamps[-1]
            self._queue.observe(start - output.created_time)
            self._prefill.observe(first - start)
            self._decode.observe(last - first)
            self._inference.observe(last - start)


def _import() -> Any:
    try:
        import prometheus_client  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "metrics need prometheus_client, which is not installed: install the extra "
            "metrics of this package, by pip install 'torch-rpa[metrics]' or, in a "
            "checkout, pip install '.[metrics]'"
        ) from error
    return prometheus_client
