"""Prometheus metrics of one application, in a registry of its own."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_PREFIX = "drorae_"
METRICS_MEDIA_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What is counted and timed. Label values come from fixed sets, so the number of series is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests",
            "Requests answered, by route and outcome (ok, or a problem's slug).",
            "route",
            "outcome",
        )
        self.request_seconds = self._histogram(
            "request_seconds", "Seconds from a request's first byte to its answer.", _SECONDS, "route"
        )
        self.requests_in_flight = self._gauge("requests_in_flight", "Requests being answered now.")
        self.queue_items = self._gauge("queue_items", "Items that wait for the model.")
        self.queue_wait_seconds = self._histogram(
            "queue_wait_seconds", "Seconds an item waited for the model.", _SECONDS
        )
        self.items = self._counter(
            "items",
            "Items that left the queue, by operation and outcome (ok, failed, expired, cancelled).",
            "operation",
            "outcome",
        )
        self.batch_items = self._histogram(
            "batch_items", "Items that went through the model at once.", _ITEMS, "operation"
        )
        self.batch_seconds = self._histogram(
            "batch_seconds", "Seconds the model took for one batch.", _SECONDS, "operation"
        )
        self.ready = self._gauge("ready", "1 while the service takes work, else 0.")
        self.model_info = self._gauge(
            "model_info",
            "Always 1; the labels say which model is loaded and how it runs.",
            "model",
            "checkpoint_sha256",
            "device",
            "dtype",
            "kernel_path",
        )

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(_PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, text, labels, buckets=buckets, registry=self.registry)
