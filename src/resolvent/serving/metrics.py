"""Metrics of the server in Prometheus' text format."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Metrics of one server.

    Args:
        engine: the engine, whose counters are read when the metrics are asked for.

    Attributes:
        requests: requests by path and status.
        first_token: seconds from a request to the first token of its first answer.
        duration: seconds from a request to the end of its answers.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "resolvent_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.first_token = self._histogram("resolvent_first_token_seconds", "Time to the first token.")
        self.duration = self._histogram("resolvent_answer_seconds", "Time to the end of all answers to a prompt.")

    def text(self) -> bytes:
        """Return the metrics as text."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)


class _EngineCollector(Collector):
    """Reads the engine's counters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the engine."""
        engine, counters = self._engine, self._engine.counters
        yield GaugeMetricFamily("resolvent_waiting_requests", "Requests that wait for a place.", engine.waiting)
        yield GaugeMetricFamily("resolvent_running_answers", "Answers being read or written.", engine.running)
        yield GaugeMetricFamily("resolvent_prefix_cache_bytes", "Size of the prefix cache.", engine.cache_bytes)
        yield CounterMetricFamily("resolvent_prompt_tokens_read", "Tokens of prompts that were read.", counters.read)
        yield CounterMetricFamily(
            "resolvent_prompt_tokens_cached", "Tokens of prompts that came from the prefix cache.", counters.cached
        )
        yield CounterMetricFamily("resolvent_tokens_written", "Tokens of answers.", counters.written)
        yield CounterMetricFamily("resolvent_steps", "Steps of the batch.", counters.steps)
