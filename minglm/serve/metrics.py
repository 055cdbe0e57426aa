"""What the server counts, as Prometheus reads it (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from minglm.serve.worker import EngineWorker

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/weights")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own, and the engine's statistics after its last step."""

    def __init__(self, worker: EngineWorker):
        self._registry = CollectorRegistry()
        self._requests = Counter("minglm_requests", "Requests answered", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "minglm_request_seconds", "From request to the answer's end", ["path"], buckets=SECONDS, registry=self._registry
        )
        self.first_token = Histogram(
            "minglm_first_token_seconds", "From queueing to the first token", buckets=SECONDS, registry=self._registry
        )
        self.prompt_tokens = Counter("minglm_prompt_tokens", "Tokens of answered prompts", registry=self._registry)
        self.new_tokens = Counter("minglm_new_tokens", "Tokens written for clients", registry=self._registry)
        self._registry.register(_EngineCollector(worker))

    def count(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"  # a label for each path that somebody tries would fill the memory
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


class _EngineCollector:
    def __init__(self, worker: EngineWorker):
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        stats, worker = self._worker.stats, self._worker
        yield GaugeMetricFamily("minglm_running", "Sequences in the batch", stats.running)
        yield GaugeMetricFamily("minglm_waiting", "Sequences that wait for room", stats.waiting)
        yield GaugeMetricFamily("minglm_free_blocks", "Blocks of the KV cache that no sequence holds", stats.free_blocks)
        yield GaugeMetricFamily("minglm_open_answers", "Answers being written or waiting", worker.open_answers)
        yield GaugeMetricFamily("minglm_weights_version", "How often the weights were replaced", worker.weights_version)
        yield CounterMetricFamily("minglm_preemptions", "Sequences put back for want of blocks", value=stats.preemptions)
        yield CounterMetricFamily("minglm_prefix_hit_tokens", "Prompt tokens found in the cache", value=stats.prefix_hit_tokens)
        for name, counts in {"drafted": stats.drafted, "accepted": stats.accepted}.items():
            family = CounterMetricFamily(
                f"minglm_{name}_tokens", f"Tokens {name} by position in the draft", labels=["position"]
            )
            for position, count in enumerate(counts, 1):
                family.add_metric([str(position)], count)
            yield family
        yield CounterMetricFamily("minglm_cancelled", "Answers given up because the client went", value=worker.cancelled)
        yield CounterMetricFamily("minglm_engine_failures", "Steps that failed", value=worker.failures)
