"""What a server counts, for Prometheus."""

import contextlib
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

from hnsw_gpu.cluster import Cluster
from hnsw_gpu.searching import Searching
from hnsw_gpu.serve.batcher import Batch, Batcher
from hnsw_gpu.serve.served_index import ServedIndex

SECONDS = tuple(0.0005 * 1.5**i for i in range(26))  # to 12 s
ROWS = tuple(2.0**i for i in range(15))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"hnsw_gpu_{name}", what, labels, registry=registry)

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"hnsw_gpu_{name}", what, registry=registry, buckets=SECONDS)

        self.requests = counter("requests", "requests by path and status code", "path", "code")
        self.request_seconds = seconds("request_seconds", "searches, arrival to answer")
        self.rows = counter("rows", "query rows that were answered")
        self.rejected = counter("rejected", "searches that were refused", "reason")
        self.cancelled = counter("cancelled", "searches whose caller left")
        self.swaps = counter("swaps", "swaps of the index", "outcome")
        self.batch_rows = Histogram(
            "hnsw_gpu_batch_rows", "rows a batch", registry=registry, buckets=ROWS
        )
        self.queue_seconds = seconds("queue_seconds", "of a request, arrival to its batch")
        self.engine_seconds = seconds("engine_seconds", "of a batch")
        self.engine_errors = counter("engine_errors", "batches that failed")
        self._queue_rows = Gauge("hnsw_gpu_queue_rows", "rows that wait", registry=registry)
        self._in_flight = Gauge(
            "hnsw_gpu_batches_in_flight", "batches in the engine", registry=registry
        )
        self.canary = Gauge(
            "hnsw_gpu_canary_recall", "recall of the canary queries", registry=registry
        )
        self._info = Gauge(
            "hnsw_gpu_index_info",
            "the index that is served, in labels",
            ["checksum", "version", "metric", "dtype", "dim", "device"],
            registry=registry,
        )
        self._vectors = Gauge("hnsw_gpu_index_vectors", "vectors in it", registry=registry)
        self._bytes = Gauge("hnsw_gpu_index_bytes", "memory that it takes", registry=registry)
        self._shards = _Shards()
        registry.register(self._shards)
        ProcessCollector(registry=registry)
        with contextlib.suppress(ImportError):
            registry.register(_GpuUse())

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)

    def watch(self, batcher: Batcher) -> None:
        """Read the batcher's queue and batches in flight at every scrape from here on."""
        self._queue_rows.set_function(lambda: batcher.waiting_rows)
        self._in_flight.set_function(lambda: batcher.in_flight)

    def batch(self, batch: Batch) -> None:
        """Count a call of the engine."""
        self.batch_rows.observe(batch.rows)
        self.engine_seconds.observe(batch.engine_s)
        for waited in batch.waited_s:
            self.queue_seconds.observe(waited)
        if not batch.is_ok:
            self.engine_errors.inc()

    def served(self, served: ServedIndex) -> None:
        """Publish what is served from here on."""
        index = served.index
        self._info.clear()
        self._info.labels(
            served.checksum, served.version, index.metric, index.dtype, index.dim, index.device
        ).set(1)
        self._vectors.set(len(index))
        self._bytes.set(index.nbytes)
        self._shards.index = index


class _Shards:
    """Collects the figures of each shard at every scrape, where they are on a cluster."""

    index: Searching | None = None

    def collect(self) -> Any:
        return self.index.collect() if isinstance(self.index, Cluster) else ()


class _GpuUse:
    """Collects the use of each GPU from NVIDIA's driver at every scrape; nothing without a GPU."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [
                pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
            ]
        except pynvml.NVMLError:
            self._handles = []

    def collect(self) -> Any:
        busy = GaugeMetricFamily("hnsw_gpu_gpu_busy_share", "of time", labels=["gpu"])
        used = GaugeMetricFamily("hnsw_gpu_gpu_memory_bytes", "in use", labels=["gpu"])
        for number, handle in enumerate(self._handles):
            with contextlib.suppress(self._nvml.NVMLError):
                share = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                busy.add_metric([str(number)], share)
                used.add_metric([str(number)], self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return [busy, used] if self._handles else []
