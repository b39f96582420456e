"""A collection on a Ray cluster: an actor a shard and replica, searched as one index."""

import asyncio
import contextlib
import itertools
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hnsw_gpu import inputs, label_inputs
from hnsw_gpu.cluster.answered_batches import answered
from hnsw_gpu.cluster.figures import shard_figures
from hnsw_gpu.cluster.ray_connection import RayConnection, ray_connection
from hnsw_gpu.cluster.shard_actor import ShardActor, ShardFacts
from hnsw_gpu.cluster.shard_calls import LOOK, ShardCalls, ShardLostError
from hnsw_gpu.collection import Manifest, Sharded, merged_answers, read_manifest
from hnsw_gpu.engine import Walk
from hnsw_gpu.files import Folder, LocalFolder, Place, folder_at, is_url
from hnsw_gpu.index import Index
from hnsw_gpu.results import PartialResult, SearchResult, reported

ON_ERROR = ("raise", "partial")
ANY_NUMBER = 1 << 40  # of actors on a node


class Cluster(Sharded):
    """The shards of a collection in actors of a Ray cluster, searched as one index is.

    Answers are those of `load(path)`, bit for bit, from whichever replicas. An actor that is lost
    is made again from the path; meanwhile calls go to the shard's other replicas, or wait. Any
    method may be called from many threads. A `with` block closes it at its end; a pickle, as in a
    task of Ray, asks the same actors and closes nothing.

    path: of the collection, as every node sees it: a folder, or a URL that fsspec knows, whose
        shards each node copies to its disk (see `load`).
    replicas: actors of each shard.
    address: of the Ray cluster, see `ray_connection`; None: the one this program is connected to,
        else one of our own on this machine, stopped at the end.
    cpus: threads that an actor searches with, and processors of a Ray of our own. Actors reserve
        none of them: those that hold every processor would leave none to Ray Data.
    gpus: of each actor, which it reserves and then searches on; may be a fraction.
    timeout_s: most that a call may take: then ShardLostError names shards that no actor is there
        for, or TimeoutError one that does not answer.
    start_timeout_s: most that opening may take.
    on_shard_error: "raise", or "partial": searches answer at once without the shards of which no
        replica is there, by a PartialResult that names them.
    storage_options: what fsspec's file system of a URL takes, such as `key` and `secret`.
    """

    _end: Any  # ends the actors, when nobody holds the cluster; None: it is another's

    def __init__(
        self,
        path: Place,
        replicas: int = 2,
        *,
        address: str | None = None,
        cpus: int = 2,
        gpus: float = 0,
        timeout_s: float = 60.0,
        start_timeout_s: float = 600.0,
        on_shard_error: str = "raise",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        replicas, cpus = inputs.integer("replicas", replicas, 1), inputs.integer("cpus", cpus, 1)
        for name, value in (("timeout_s", timeout_s), ("start_timeout_s", start_timeout_s)):
            if not inputs.number(name, value) > 0:
                raise ValueError(f"{name}={value}: expected more than 0")
        if not 0 <= inputs.number("gpus", gpus) < np.inf:
            raise ValueError(f"gpus={gpus}: expected 0 or more")
        inputs.one_of("on_shard_error", on_shard_error, ON_ERROR)
        folder = folder_at(path, storage_options)
        if isinstance(folder, LocalFolder) and folder.path.is_file():
            raise ValueError(f"{folder}: no collection: `hnsw-gpu build --shard-rows` makes one")
        manifest = read_manifest(folder)
        with contextlib.ExitStack() as opening:
            connection = opening.enter_context(ray_connection(address, cpus=cpus))
            handles = opening.enter_context(
                _actors(connection, folder, manifest, replicas, cpus, gpus)
            )
            calls = ShardCalls([entry.file for entry in manifest.shards], handles, timeout_s)
            facts = _opened(connection, calls, start_timeout_s, gpus)
            place = folder.path.absolute() if isinstance(folder, LocalFolder) else str(folder)
            self._attach(place, manifest, calls, facts, cpus, on_shard_error)
            self.require_labels_once()
            self._end = weakref.finalize(self, opening.pop_all().close)

    def _attach(
        self,
        path: Path | str,
        manifest: Manifest,
        calls: ShardCalls,
        facts: list[ShardFacts],
        cpus: int,
        on_shard_error: str,
    ) -> None:
        Sharded.__init__(self, path, manifest)
        self._calls, self._facts, self._cpus = calls, facts, cpus
        self._on_shard_error = on_shard_error
        self._end = None

    def __reduce__(self) -> tuple:
        self._require_open()
        parts = self._calls, self._facts, self._cpus, self._on_shard_error
        return _another, (self.path, self.manifest, *parts)

    def close(self) -> None:
        """End the actors, and Ray where we started it. Calls that run are lost."""
        if self._end is not None:
            self._end()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._end is not None and not self._end.alive:
            raise RuntimeError("the cluster is closed")

    # ---------------------------------------------------------------- what it is

    @property
    def device(self) -> str:
        """Where the actors search: "cpu" or "cuda"."""
        return self._facts[0].device

    @property
    def calls_at_once(self) -> int:
        """How many searches of large batches are worth running beside each other."""
        return super().calls_at_once * len(self._calls.replicas[0])

    @property
    def nbytes(self) -> int:
        """Bytes that one replica of each shard takes, mapped rows too."""
        return sum(facts.nbytes for facts in self._facts)

    @property
    def has_deleted(self) -> bool:
        """Is there a node that is walked through and never returned?"""
        return any(facts.has_deleted for facts in self._facts)

    def check(self) -> None:
        """Raise ValueError naming what is wrong."""
        self._of_each(Index.check)

    def warm_up(self, threads: int | None = None) -> None:
        """Nothing: every actor does so before its first call."""

    def compile_kernels(self) -> None:
        """Nothing: every actor does so before its first call."""

    def status(self) -> dict[str, Any]:
        """Of every shard: its file, rows, the calls that needed another actor, and its replicas.

        Of a replica: its state, "live", "lost" (Ray makes it again) or "silent" (no word within
        3 s); the node, the process, searches answered and the seconds they took since it was made.
        """
        self._require_open()
        shards = []
        look = self._calls.look()
        for entry, found, retries in zip(
            self.manifest.shards, look, self._calls.retries, strict=True
        ):
            replicas = [_state(facts) for facts in found]
            shards.append(
                {"file": entry.file, "rows": entry.rows, "retries": retries, "replicas": replicas}
            )
        return {"path": str(self.path), "rows": len(self), "shards": shards}

    def is_ready(self) -> bool:
        """Has each shard a live replica?"""
        self._require_open()
        return self._calls.are_there()

    def collect(self) -> Iterator[Any]:
        """Figures of each shard for Prometheus: `prometheus_client.REGISTRY.register(cluster)`."""
        yield from shard_figures(self.status())

    # ---------------------------------------------------------------- searching

    async def search_async(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        ef: int = 64,
        allow: ArrayLike | None = None,
        expand: int | None = None,
        ef_upper: int = 1,
        rerank: int | str | None = "auto",
    ) -> SearchResult:
        """As `search`, for tasks of an event loop."""
        expand = self._expand(ef) if expand is None else expand
        walk = inputs.walk(k, ef, None, expand, ef_upper, rerank, self.dtype)
        begun = self._begin(self.checked_queries(queries), walk, allow)
        return self._answer(await asyncio.wrap_future(begun), walk)

    def map_batches(
        self,
        queries: Any,
        out: str | os.PathLike[str] | None = None,
        *,
        k: int = 10,
        ef: int = 64,
        rerank: int | str | None = "auto",
        column: str = "embedding",
        batch_rows: int = 1024,
    ) -> Any:
        """Search all rows of a `ray.data.Dataset` or of files, a batch at a time, on the cluster.

        The rows of a Dataset get two columns more, `labels` and `distances`, lists of k each. Of
        files (a path, or several, of what `dedup` reads, as every node sees them) there is a row
        each of `row`, its number, and these two. Ray Data decides how many batches are under way,
        and keeps no order of rows. A lost shard is always an error, whatever `on_shard_error` is.

        out: a folder of its own to write parquet files into; None: the Dataset of the answers is
            returned, which is computed as it is read.
        column: of the vectors, in tables and Datasets.
        """
        self._require_open()
        inputs.walk(k, ef, None, 1, 1, rerank, self.dtype)
        how = {"k": k, "ef": ef, "rerank": rerank}
        found = answered(self, queries, how, column, inputs.integer("batch_rows", batch_rows, 1))
        if out is None:
            return found
        if is_url(out):
            raise ValueError(
                f"out={out!r}: expected a folder; `write_parquet` of the Dataset that is returned "
                "without it takes URLs"
            )
        folder = Path(out).absolute()
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: answers are written into a folder of theirs")
        found.write_parquet(str(folder))
        return None

    def search_checked(self, queries: np.ndarray, k: int, **how: Any) -> SearchResult:
        """As `search`, of queries that `checked_queries` gave; a lost shard is always an error."""
        found = super().search_checked(queries, k, **how)
        if isinstance(found, PartialResult):
            if found.missing:
                raise ShardLostError(f"no replica answers of {found.missing}", found.missing)
            return SearchResult(*found)
        return found

    def _found(self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None) -> SearchResult:
        return self._answer(self._calls.waited_for(self._begin(queries, walk, allow)), walk)

    def _begin(self, queries: np.ndarray, walk: Walk, allow: ArrayLike | None) -> Any:
        self._require_open()
        may_lack = self._on_shard_error == "partial"
        allow = None if allow is None else label_inputs.label_array("allow", allow)
        what = queries, walk._replace(threads=self._cpus), allow
        return self._calls.begin(Index._nearest, what, may_lack=may_lack)

    def _answer(self, parts: list[Any], walk: Walk) -> SearchResult:
        there = [part for part in parts if not isinstance(part, ShardLostError)]
        if not there:
            raise parts[0]
        labels, distances = merged_answers(there, walk.k)
        distances = reported(distances, self.metric)
        if self._on_shard_error == "raise":
            return SearchResult(labels, distances)
        lost = [part.shards for part in parts if isinstance(part, ShardLostError)]
        return PartialResult(labels, distances, sum(lost, ()))

    def _of_each(self, ask: Any, *what: Any) -> list[Any]:
        self._require_open()
        of_ours = (
            value._replace(threads=self._cpus) if isinstance(value, Walk) else value
            for value in what
        )
        return self._calls.of_each(ask, *of_ours)


def _another(path: Path | str, manifest: Manifest, *parts: Any) -> Cluster:
    """A cluster of the same actors."""
    cluster = Cluster.__new__(Cluster)
    cluster._attach(path, manifest, *parts)
    return cluster


@contextlib.contextmanager
def _actors(
    connection: RayConnection,
    folder: Folder,
    manifest: Manifest,
    replicas: int,
    cpus: int,
    gpus: float,
) -> Iterator[list[list[Any]]]:
    """Handles of the actors of each shard, which end with the block.

    Each asks for a byte: those that ask for nothing Ray puts anywhere, whatever it is told.
    """
    ray = connection.ray
    ray.method(concurrency_group=LOOK)(ShardActor.facts)  # said here: there, Ray is not imported
    made = ray.remote(
        num_cpus=0,
        num_gpus=gpus,
        memory=1,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=cpus,
        concurrency_groups={LOOK: 1},
    )(ShardActor)
    device, room = "cuda" if gpus else "cpu", _room(ray, gpus)
    handles: list[list[Any]] = []
    try:
        for entry in manifest.shards:
            mine = manifest._replace(shards=(entry,))
            handles.append([])
            for place in _places(room, replicas):
                placed = made.options(scheduling_strategy=place)
                handles[-1].append(placed.remote(folder, entry, mine, device, cpus))
        yield handles
    finally:
        if connection.is_there():
            for handle in itertools.chain(*handles):
                with contextlib.suppress(Exception):  # of one, which is no reason to leave others
                    ray.kill(handle)


def _room(ray: Any, gpus: float) -> dict[str, int]:
    """How many actors each node takes, by its id: as its GPUs give; of CPUs any number."""
    room = {}
    for node in sorted(ray.nodes(), key=lambda node: node["NodeID"]):
        has = node["Resources"]
        if node["Alive"] and has.get("CPU") and has.get("GPU", 0) >= gpus:
            room[node["NodeID"]] = int(has["GPU"] / gpus) if gpus else ANY_NUMBER
    return room


def _places(room: dict[str, int], replicas: int) -> list[Any]:
    """Where the replicas of a shard go: where there is room, on several nodes, where most room is.

    What they take is taken from `room`. (Ray's own "SPREAD" puts two that follow each other on one
    node now and then.) A node that somebody else has filled is left for another.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    taken: list[str] = []
    for _ in range(replicas if room else 0):
        place = max(room, key=lambda node: (room[node] > 0, -taken.count(node), room[node]))
        room[place] -= 1
        taken.append(place)
    return [
        NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        for node in taken
    ] or ["SPREAD"] * replicas


def _opened(
    connection: RayConnection, calls: ShardCalls, within_s: float, gpus: float
) -> list[ShardFacts]:
    """What the first replica of each shard tells of itself, once all replicas are there."""
    try:
        return [facts[0] for facts in calls.opened(within_s)]
    except TimeoutError as error:
        has = connection.ray.cluster_resources().get("GPU", 0)
        needs = f"; each needs gpus={gpus:g}, of {has:g} in the cluster" if gpus else ""
        raise TimeoutError(f"{error} (start_timeout_s){needs}") from None


def _state(facts: ShardFacts | BaseException) -> dict[str, Any]:
    if isinstance(facts, ShardFacts):
        return {"state": "live"} | facts._asdict()
    if isinstance(facts, TimeoutError):
        return {"state": "silent"}
    return {"state": "lost", "why": str(facts).strip().partition("\n")[0]}
