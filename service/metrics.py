"""Prometheus metrics of one application, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

METRICS_MEDIA_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What is counted and timed. Label values come from fixed sets, so the number of series is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "drorae_requests",
            "Requests answered, by route and outcome (ok, or a problem's slug).",
            ["route", "outcome"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "drorae_request_seconds",
            "Seconds from a request's first byte to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.requests_in_flight = Gauge(
            "drorae_requests_in_flight", "Requests being answered now.", registry=self.registry
        )
        self.queue_items = Gauge(
            "drorae_queue_items", "Items that wait for the model.", registry=self.registry
        )
        self.queue_wait_seconds = Histogram(
            "drorae_queue_wait_seconds",
            "Seconds an item waited for the model.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.items = Counter(
            "drorae_items",
            "Items that left the model, by operation and outcome (ok, failed, expired, cancelled).",
            ["operation", "outcome"],
            registry=self.registry,
        )
        self.batch_items = Histogram(
            "drorae_batch_items",
            "Items that went through the model at once.",
            ["operation"],
            buckets=_ITEMS,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "drorae_batch_seconds",
            "Seconds the model took for one batch.",
            ["operation"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.ready = Gauge("drorae_ready", "1 while the service takes work, else 0.", registry=self.registry)
        self.model_info = Gauge(
            "drorae_model_info",
            "Always 1; the labels say which model is loaded and how it runs.",
            ["model", "checkpoint_sha256", "device", "dtype", "kernel_path"],
            registry=self.registry,
        )

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
