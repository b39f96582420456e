"""The work folder of a deduplication of files, and how far one has come there."""

from pathlib import Path

from hnsw_gpu.files import Checkpoints, LocalFolder

WORK = "_hnsw_gpu_dedup"  # in OUT. Where OUT is also read from: names with "_" are no input
MADE_BY = "hnsw-gpu dedup"
STEPS = r"((shard|against)-(\d+|numbers)|block-\d+-\d+|against)\.safetensors"


def checkpoints_in(out: Path) -> Checkpoints:
    """The steps of a deduplication into folder `out`."""
    return Checkpoints(LocalFolder(out / WORK), MADE_BY, STEPS)


def interrupted_state(out: Path) -> str:
    """How far an interrupted deduplication into OUT has come, in words."""
    work = out / WORK
    built, joined = (len(list(work.glob(f"{what}-[0-9]*"))) for what in ("shard", "block"))
    return f"{built} shards built, {joined} blocks joined: the same command goes on from there"
