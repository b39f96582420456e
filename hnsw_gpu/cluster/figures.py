"""Figures of shards, for Prometheus."""

from collections.abc import Iterator
from typing import Any


def shard_figures(status: dict[str, Any]) -> Iterator[Any]:
    """The families of a cluster's status."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    def family(kind: Any, name: str, what: str, *labels: str) -> Any:
        return kind(f"hnsw_gpu_shard_{name}", what, labels=["shard", *labels])

    rows = family(GaugeMetricFamily, "rows", "vectors in it")
    retries = family(CounterMetricFamily, "retries", "calls that another actor was asked for")
    live = family(GaugeMetricFamily, "live_replicas", "actors that answer")
    replicas = family(GaugeMetricFamily, "replicas", "actors that there should be")
    nbytes = family(GaugeMetricFamily, "bytes", "that an actor holds", "replica")
    searches = family(CounterMetricFamily, "searches", "since the actor was made", "replica")
    busy = family(CounterMetricFamily, "busy_seconds", "of these", "replica")
    for shard in status["shards"]:
        name = shard["file"]
        states = [replica["state"] for replica in shard["replicas"]]
        rows.add_metric([name], shard["rows"])
        retries.add_metric([name], shard["retries"])
        live.add_metric([name], states.count("live"))
        replicas.add_metric([name], len(states))
        for number, replica in enumerate(shard["replicas"]):
            if replica["state"] == "live":
                place = [name, str(number)]
                nbytes.add_metric(place, replica["nbytes"])
                searches.add_metric(place, replica["searches"])
                busy.add_metric(place, replica["busy_s"])
    yield from (rows, retries, live, replicas, nbytes, searches, busy)
