"""From near rows to a result: the last stages, which rows in memory and in files share."""

from typing import Any

from hnsw_gpu.deduplication import figures
from hnsw_gpu.deduplication.decision import NearRows
from hnsw_gpu.deduplication.result import DedupResult, decision_parameters
from hnsw_gpu.deduplication.settings import Settings
from hnsw_gpu.deduplication.stage_clock import StageClock


def conclude(
    near: NearRows, settings: Settings, ids: Any, is_joined: bool, clock: StageClock
) -> DedupResult:
    """Decide, count and measure. is_joined: pairs were looked for, so that recall has a meaning."""
    decision = near.decide(near.limit, settings.linkage, settings.keep)
    clock.ends("group")
    report: dict[str, Any] = {
        **figures.counts(near, decision, near.limit),
        "histogram": figures.histogram(near),
        "recall": figures.recall(near, settings.seed) if is_joined else None,
        "row_reads": figures.row_reads(near.shards),
    }
    clock.ends("recall")
    report["parameters"] = {
        "metric": near.metric,
        "method": "exact" if near.shards.opened(0).graph is None else "hnsw",
        **decision_parameters(near, near.limit, settings.linkage, settings.keep),
    }
    return DedupResult(near, decision, settings.keep, ids, report)
