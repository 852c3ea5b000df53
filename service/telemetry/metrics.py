"""Prometheus metrics of one application, in a registry of its own."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_PREFIX = "drorae_"
METRICS_MEDIA_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PADDING = (0, 1, 2, 4, 8, 16, 32, 64)
_BYTES = tuple(4**exponent * 1024 for exponent in range(10))  # 1 KiB to 256 MiB


class Metrics:
    """Counters, gauges and histograms. Label values come from fixed sets, so the number of series is bounded.

    A request's way, and what times it: its body is read and decoded (``body_decode_seconds``), its items
    wait for a batch (``queue_seconds``), the batch waits for the device (``batch_wait_seconds``) and runs
    (``device_seconds``), the answer is written (``answer_encode_seconds``); ``request_seconds`` is all of it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._add_request_metrics()
        self._add_engine_metrics()

    def _add_request_metrics(self) -> None:
        self.requests = self._counter(
            "requests",
            "Requests answered, by route and outcome (ok, or a problem's slug).",
            "route",
            "outcome",
        )
        self.rejected_requests = self._counter(
            "rejected_requests",
            "Requests refused for lack of room, by reason (items, bytes, pixels, deadline).",
            "reason",
        )
        self.rejected_connections = self._counter(
            "rejected_connections",
            "Connections closed, by reason (limit, idle, header-timeout, header-bytes, slow-reader).",
            "reason",
        )
        self.disconnects = self._counter(
            "disconnects", "Requests whose client went away before the answer, which freed their place."
        )
        self.request_seconds = self._histogram(
            "request_seconds", "Seconds from a request's first byte to its answer.", _SECONDS, "route"
        )
        self.body_decode_seconds = self._histogram(
            "body_decode_seconds", "Seconds to make tensors of a request's body.", _SECONDS, "route"
        )
        self.answer_encode_seconds = self._histogram(
            "answer_encode_seconds", "Seconds to write an answer's bytes.", _SECONDS, "route"
        )
        self.request_bytes = self._histogram("request_bytes", "Bytes of a request's body.", _BYTES, "route")
        self.response_bytes = self._histogram("response_bytes", "Bytes of an answer's body.", _BYTES, "route")
        self.decoders = self._gauge("decoders", "Decoder processes that run.")
        self.decoder_busy_seconds = self._counter(
            "decoder_busy_seconds", "Seconds that decoders took for images; over decoders it is their use."
        )
        self.decoder_failures = self._counter(
            "decoder_failures", "Decoder processes that ended or hung, and were started again."
        )
        self.requests_in_flight = self._gauge("requests_in_flight", "Requests being answered now.")

    def _add_engine_metrics(self) -> None:
        self.pending_items = self._gauge("pending_items", "Items accepted and not yet answered.")
        self.pending_bytes = self._gauge(
            "pending_bytes", "Bytes that requests hold now: bodies, tensors, answers."
        )
        self.pending_pixels = self._gauge(
            "pending_pixels", "Pixels of image files that wait for their decoding."
        )
        self.queue_items = self._gauge("queue_items", "Items that wait for the model.")
        self.queue_seconds = self._histogram(
            "queue_seconds", "Seconds an item waited for a batch.", _SECONDS, "operation"
        )
        self.batch_wait_seconds = self._histogram(
            "batch_wait_seconds", "Seconds a batch waited for the device.", _SECONDS, "operation"
        )
        self.device_seconds = self._histogram(
            "device_seconds", "Seconds the device took for one batch.", _SECONDS, "operation"
        )
        self.device_busy_seconds = self._counter(
            "device_busy_seconds", "Seconds that batches ran; its rate is the engine's use.", "engine"
        )
        self.batch_items = self._histogram(
            "batch_items", "Items that went through the model at once.", _ITEMS, "operation"
        )
        self.batch_padding_items = self._histogram(
            "batch_padding_items", "Items that filled a batch up to its bucket.", _PADDING, "operation"
        )
        self.items = self._counter(
            "items",
            "Items that left the queue, by operation and outcome (ok, failed, expired, cancelled).",
            "operation",
            "outcome",
        )
        self.batch_failures = self._counter(
            "batch_failures",
            "Batches that failed and were split, by reason (out-of-memory, refused, error).",
            "reason",
        )
        self.device_memory_bytes = self._gauge(
            "device_memory_bytes",
            "Memory of the model's process on a GPU, or resident on a CPU.",
            "device",
        )
        self.engines = self._gauge("engines", "Engines that share the queue.")
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
        return Gauge(_PREFIX + name, text, labels, registry=self.registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, text, labels, buckets=buckets, registry=self.registry)
