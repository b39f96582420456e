"""The tables of figures in the READMEs and the manual, made from `benchmarks/results`.

python -m benchmarks.tables

writes each anew between its marks, `<!-- table: NAME -->` and `<!-- end -->`. A test holds the
pages to the results: whoever measures again runs this once.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median as median_of

import click

from benchmarks.peers import LABELS
from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n).*?(?=^<!-- end -->$)", re.M | re.S)
OURS = {"ours-fp32": "fp32", "ours-int8": "int8 + refine", "ours-int4": "int4 + refine"}
KINDS = {  # of processors, and their results
    "AVX-512, AMD EPYC": "cpu-avx512-vnni-amd",
    "AVX-512, Intel Xeon": "cpu-avx512-vnni-intel",
    "AVX2 (an AMD EPYC held to it)": "cpu-avx2-amd",
}
FIRST = "cpu-avx512-vnni-amd"  # of which there are all sections
SETS = {
    "glove": "GloVe words",
    "verses": "Sentences",
    "verses768": "Sentences, 768-d",
    "clusters": "Drawn clusters",
}
NOT_MEASURED = "not measured yet on such a processor"


def pages() -> list[Path]:
    own = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    return [*own, *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str) -> str:
    """The text of a page with its tables written anew."""
    return MARKED.sub(lambda found: found[1] + found[2] + "\n" + TABLES[found[1]]() + "\n", text)


def results(stem: str) -> dict:
    found: dict = json.loads((RESULTS / f"{stem}.json").read_text())
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(stem: str, about: dict, command: str, more: str = "") -> str:
    """Where the figures come from, as a line of its own."""
    where = f"{about['date'][:10]}, {about['processor']}, {about['cores']} cores"
    if "without its" in about["processor"]:
        where += ", by the settings in `benchmarks/README.md`"
    return f"\n{more}{' ' * bool(more)}`benchmarks/results/{stem}.json` ({where}): `{command}`\n"


def ratio(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def name(side: str) -> str:
    return OURS.get(side, LABELS.get(side, side))


# ---------------------------------------------------------------- races on the CPU


def race_command(peers: Iterable[str], *more: str) -> str:
    return " ".join([f"python -m benchmarks.cpu.run --peers {','.join(peers)}", *more])


def sets_option(found: Iterable[str]) -> str:
    return f"--datasets {','.join(found)}"


def peers_of(race: dict) -> list[str]:
    pairs = [pair.split("/") for pair in race["build"]["ratios"]]
    return list(dict.fromkeys(peer for _, peer in pairs))


def sides_of(race: dict) -> list[str]:
    return [side for side in OURS if side in race["build"]["seconds"]]


def at(race: dict, recall: float, threads: int) -> dict:
    """Ratios of queries/s at a recall."""
    (entry,) = (
        entry
        for entry in race["searches"]
        if (entry["recall"], entry["threads"]) == (recall, threads)
    )
    found: dict = entry["ratios"]
    return found


def median(ratios: dict, side: str, peer: str) -> str:
    pair = ratios.get(f"{side}/{peer}")
    return ratio(pair["median"]) if pair else "-"


def speed() -> str:
    """The README's: both kinds of processor, one recall, one thread, one data set."""
    peers: list[str] = []
    rows, notes = [], ""
    for kind, stem in KINDS.items():
        if not (RESULTS / f"{stem}.json").exists():
            rows.append([kind, NOT_MEASURED])
            continue
        section = results(stem)["race"]
        key = next((key for key in SETS if key in section["results"]), "")
        race = section["results"][key]
        peers = peers or peers_of(race)
        ratios = at(race, 0.95, 1)
        rows += [
            [kind, OURS[side], *(median(ratios, side, peer) for peer in peers)]
            for side in sides_of(race)
        ]
        data = f"{SETS[key]}, {race['rows']:,} × {race['dim']}, cosine."
        notes += source(
            stem,
            section["about"],
            race_command(peers_of(race), "--only race", f"--datasets {key}"),
            data,
        )
    width = 2 + len(peers)
    rows = [row + [""] * (width - len(row)) for row in rows]
    return table(["processor", "rows kept as", *map(name, peers)], rows) + notes


def race() -> str:
    """One thread and two, at every recall, on every data set, of every kind of processor."""
    text = ""
    for kind, stem in KINDS.items():
        if not (RESULTS / f"{stem}.json").exists():
            text += f"**{kind}**: {NOT_MEASURED}.\n\n"
            continue
        section = results(stem)["race"]
        for key, found in section["results"].items():
            text += f"**{kind}, {SETS.get(key, key)}**, {found['rows']:,} × {found['dim']}"
            text += ", one thread, two threads:\n\n"
            recalls = sorted({entry["recall"] for entry in found["searches"]})
            text += table(
                ["", *(f"recall {recall:.2f}" for recall in recalls)],
                [
                    [f"{name(side)} / {name(peer)}"]
                    + [
                        ", ".join(median(at(found, recall, t), side, peer) for t in (1, 2))
                        for recall in recalls
                    ]
                    for side in sides_of(found)
                    for peer in peers_of(found)
                ],
            )
            text += "\n"
        text = text.rstrip("\n") + "\n"
        command = race_command(peers_of(found), "--only race", sets_option(section["results"]))
        text += source(stem, section["about"], command) + "\n"
    return text.rstrip("\n") + "\n"


def taken(ratios: dict, side: str, peer: str) -> str:
    pair = ratios.get(f"{side}/{peer}")
    return f"{pair['median']:.2f}" if pair else "-"


def build() -> str:
    """Processor time of building over the peers', by data set."""
    text = ""
    for kind, stem in KINDS.items():
        if not (RESULTS / f"{stem}.json").exists():
            continue
        section = results(stem)["race"]
        sets = section["results"]
        first = next(iter(sets.values()))
        text += f"\n**{kind}**\n\n" + table(
            ["processor seconds of building, over", *(SETS.get(key, key) for key in sets)],
            [
                [f"{name(side)} / {name(peer)}"]
                + [taken(found["build"]["processor_ratios"], side, peer) for found in sets.values()]
                for side in sides_of(first)
                for peer in peers_of(first)
            ],
        )
        command = race_command(peers_of(first), "--only race", sets_option(sets))
        text += source(stem, section["about"], command)
    return text.lstrip("\n")


def memory() -> str:
    """Resident memory, each index in a process of its own."""
    section = results(FIRST)["memory"]
    found = section["results"]
    first = next(iter(found.values()))
    return table(
        ["GloVe words", "MiB", "over fp32 rows and layer 0's links", "most while building, MiB"],
        [
            [
                f"hnsw_gpu {OURS[side]}" if side in OURS else name(side),
                f"{of['bytes'] / 2**20:,.0f}",
                f"{of['growth_over_rows_and_layer_0']:.2f}",
                f"{of['peak_bytes'] / 2**20:,.0f}",
            ]
            for side, of in found.items()
        ],
    ) + source(
        FIRST,
        section["about"],
        race_command([side for side in found if side not in OURS], "--only memory"),
        f"{first['rows']:,} × {first['dim']}.",
    )


# ---------------------------------------------------------------- what is counted

KNOBS = "python -m benchmarks.cpu.knobs"


def knobs_source(found: dict) -> str:
    sets = [f"{of['title']}: {of['rows']:,} × {of['dim']}" for of in found["sets"].values()]
    return source("knobs", found, KNOBS, f"{'; '.join(sets)}. Counted: no clock is in it.")


def ef() -> str:
    """Recall, and distances computed, by ef."""
    found = results("knobs")
    sets = found["sets"].values()
    plain = f"M {found['M']}, ef_construction {found['ef_construction']}"
    return table(
        ["ef", *(f"{of['title']}, {of['dim']}-d" for of in sets)],
        [
            [str(ef)]
            + [f"{of['recall'][plain][i]:.3f}, {of['distances'][plain][i]:,.0f}" for of in sets]
            for i, ef in enumerate(found["ef"])
        ],
    ) + knobs_source(found)


def built_with(settings: list[tuple[int, int]], field: str, head: str) -> str:
    found = results("knobs")
    sets = found["sets"].values()
    places = [found["ef"].index(ef) for ef in (32, 64, 256)]
    rows = []
    for M, ef_construction in settings:
        key = f"M {M}, ef_construction {ef_construction}"
        recalls = [" / ".join(f"{of['recall'][key][i]:.3f}" for i in places) for of in sets]
        at_64 = [f"{of['distances'][key][places[1]]:,.0f}" for of in sets]
        rows.append([{"M": str(M), "ef_construction": str(ef_construction)}[field], *recalls])
        rows[-1].append(", ".join(at_64))
        if field == "M":
            rows[-1].append(", ".join(f"{of['bytes_a_row'][key]:.0f}" for of in sets))
    last = ["bytes a row"] if field == "M" else []
    heads = [f"{of['title']}, {of['dim']}-d" for of in sets]
    return table([head, *heads, "distances at ef 64", *last], rows) + knobs_source(found)


def links() -> str:
    """Recall, distances and bytes by M."""
    return built_with([(8, 200), (16, 200), (32, 200)], "M", "M")


def ef_construction() -> str:
    """Recall and distances by ef_construction."""
    settings = [(16, 50), (16, 100), (16, 200), (16, 400)]
    return built_with(settings, "ef_construction", "ef_construction")


def rerank() -> str:
    """Recall by the number that is re-ranked."""
    found = results("reranking")
    keys = list(found["recall"])
    heads = [f"{SETS[key.split()[0]]}, {key.split()[1]}" for key in keys]
    depths = list(found["recall"][keys[0]])
    return table(
        ["`rerank`", *heads],
        [
            [depth, *(" / ".join(f"{r:.3f}" for r in found["recall"][key][depth]) for key in keys)]
            for depth in depths
        ],
    ) + source(
        "reranking",
        found,
        "python -m benchmarks.cpu.reranking",
        f"{found['rows']:,} rows, {found['refine']} beside the codes.",
    )


def mapped() -> str:
    """What refine rows on the disk cost."""
    found = results("larger-than-memory")
    cases = ("in memory", "mapped, without a limit", "mapped, within the limit")
    limit = f"mapped, within {found['limit_bytes'] / 2**20:.0f} MiB"
    most = found["in memory"]["queries_per_s"]
    return table(
        ["", "queries/s, of those in memory", "waits a query", "MiB, without pages of the file"],
        [
            [
                limit if case == cases[2] else case,
                f"{found[case]['queries_per_s'] / most:.2f}",
                f"{found[case]['reads_a_query']:.1f}",
                f"{found[case]['bytes_without_pages_of_the_file'] / 2**20:,.0f}",
            ]
            for case in cases
        ],
    ) + source(
        "larger-than-memory",
        found,
        "python -m benchmarks.cpu.larger_than_memory",
        f"{found['rows']:,} × {found['dim']}, {found['dtype']} beside {found['refine']} rows of "
        f"{found['refine_bytes'] / 2**20:,.0f} MiB, ef {found['ef']}.",
    )


def inner_product() -> str:
    """Recall beside hnswlib's where lengths differ."""
    found = results("inner-product")
    heads = [f"ef {ef}" for ef in found["ef"]]
    return table(
        ["recall@10: hnsw_gpu, hnswlib", *heads],
        [
            [key] + [f"{a:.3f}, {b:.3f}" for a, b in zip(of["ours"], of["hnswlib"], strict=True)]
            for key, of in found["recall"].items()
        ],
    ) + source(
        "inner-product",
        found,
        "python -m benchmarks.cpu.inner_product",
        "sigma: of the logarithm of the lengths.",
    )


def adding() -> str:
    """What changing one label costs as an index grows."""
    found = results("adding")
    again, single = found["replacing"], found["single_changes"]
    sizes = sorted({one["rows"] for one in single})
    ratios = {(one["change"], one["rows"]): one["ratio"] for one in single}
    more = (
        f"Replacing the same {again['replaced']:,} of {again['rows']:,} rows {again['rounds']} "
        f"times takes {again['seconds_of_adding']:.1f} times as long as adding as many (the second "
        f"half {again['second_half_of_first']:.2f} of the first), and at most "
        f"{again['most_bytes_of_first']:.1f} times the memory."
    )
    return table(
        ["one change, in times of that at the fewest rows", *(f"{size:,} rows" for size in sizes)],
        [
            [change, *(f"{ratios[change, size]:.2f}" for size in sizes)]
            for change in dict.fromkeys(one["change"] for one in single)
        ],
    ) + source("adding", found, "python -m benchmarks.cpu.adding", more)


def tuning() -> str:
    """The recall that `tune` found, and that of queries which it had not seen."""
    found = results("tuning")
    return table(
        [
            "",
            "asked",
            "ef by stored vectors",
            "found",
            "unseen queries",
            "ef by queries",
            "found",
            "unseen queries",
        ],
        [
            [
                SETS.get(name, "Sums of two words"),
                asked,
                *(
                    cell
                    for by in ("stored", "queries")
                    for cell in (
                        f"{of[by]['ef']}",
                        f"{of[by]['recall']:.3f}",
                        f"{of[by]['delivered']:.3f}",
                    )
                ),
            ]
            for name, targets in found["results"].items()
            for asked, of in targets.items()
        ],
    ) + source("tuning", found["about"], "python -m benchmarks.cpu.tuning", "Recall@10, int4.")


def one_query() -> str:
    """Calls of one query each beside hnswlib's, and the same queries in one call."""
    found = results("one-query")
    return table(
        ["rows", *OURS.values()],
        [
            [
                f"{of['rows']:,}",
                *(
                    ", ".join(
                        f"{of[way][f'{side}/hnswlib']['median']:.2f}"
                        for way in ("calls_per_s_ratios", "batched_per_s_ratios")
                    )
                    for side in OURS
                ),
            ]
            for of in found["sizes"]
        ],
    ) + source(
        "one-query",
        found,
        "python -m benchmarks.cpu.one_query",
        f"{SETS['glove']}, recall@10 0.95, one thread.",
    )


# ---------------------------------------------------------------- dedup, serving, GPUs


def dedup() -> str:
    """Beside semhash and an exact join."""
    found = results("dedup")
    sizes = found["results"]

    def row(title: str, cell: Callable[[dict], str]) -> list[str]:
        return [title, *(cell(sides) for sides in sizes.values())]

    three = ("hnsw_gpu", "hnsw_gpu fast", "semhash")
    rows = [
        row(
            "semhash's time over ours; fast",
            lambda of: "; ".join(
                f"{of[side]['semhash_seconds_over_own']:.1f}" for side in three[:2]
            ),
        ),
        row(
            "missed: ours; fast; semhash",
            lambda of: "; ".join(f"{of[side]['missed']:,}" for side in three),
        ),
        row("dropped by ours", lambda of: f"{of['hnsw_gpu']['removed']:,}"),
        row("dropped by an exact join", lambda of: _removed(of.get("faiss exact"))),
        row("dropped, and no kept row is near", lambda of: _over_removed(of)),
        row(
            "most memory beyond the vectors, MB: ours; semhash",
            lambda of: "; ".join(f"{of[side]['peak_bytes'] / 1e6:,.0f}" for side in three[::2]),
        ),
    ]
    more = f"256-d, cosine at least {found['threshold']}; fast: `ef_construction=64, ef=32`."
    return table(["clauses", *(f"{int(size):,}" for size in sizes)], rows) + source(
        "dedup", found["about"], "python -m benchmarks.dedup run", more
    )


def _removed(side: dict | None) -> str:
    return "-" if side is None else f"{side['removed']:,}"


def _over_removed(sides: dict) -> str:
    return f"{max(side['over_removed'] for side in sides.values()):,}"


def dedup_thresholds() -> str:
    """Precision and recall by threshold, where a person can judge."""
    found = results("dedup-thresholds")
    of = found["results"]
    return table(
        ["threshold", *of],
        [[name, *(f"{at[name]:.2f}" for at in of.values())] for name in ("precision", "recall")],
    ) + source(
        "dedup-thresholds",
        found["about"],
        "python -m benchmarks.dedup translations --out benchmarks/results/dedup-thresholds.json",
        f"{found['rows']:,} verses.",
    )


def serving() -> str:
    """Batching, and what HTTP costs."""
    found = results("serve")
    of, about = found["results"], found["about"]

    def line(title: str, value: dict, digits: int = 2) -> list[str]:
        spread = f"{value['lowest']:.{digits}f}, {value['highest']:.{digits}f}"
        return [title, f"{value['median']:.{digits}f}", spread]

    many, direct = of["64_callers_of_one_row"], of["256_rows_over_direct"]
    rows = [
        line(
            "one lone caller of one row: latency over unbatched",
            of["lone_caller"]["latency_over_unbatched"],
        ),
        line("64 callers of one row: throughput over unbatched", many["throughput_over_unbatched"]),
        line("rows a call of the engine then", many["rows_a_batch"], 0),
        *(
            line(
                f"256 rows a request, {callers}: rows/s over `Index.search`".replace(
                    "1 callers:", "1 caller:"
                ),
                value,
            )
            for callers, value in direct.items()
        ),
        line("start of the process until ready, compiled code cached, s", of["cold_start_s"], 1),
    ]
    swaps, soak = of["swaps"], of["soak"]
    rows += [
        [
            f"{swaps['swaps']} swaps under load: requests, failed",
            f"{swaps['requests']:,}, {swaps['failed']}",
            "",
        ],
        [
            f"{soak['seconds'] / 60:.0f} minutes: requests, failed",
            f"{soak['requests']:,}, {soak['failed']}",
            "",
        ],
    ]
    more = f"{about['rows']:,} × {about['dim']}; the callers run on the same cores."
    return table(["", "median", "lowest, highest"], rows) + source(
        "serve", about, "python -m benchmarks.serve run", more
    )


def bounded(card: dict) -> str:
    """Thousand queries/s, and what forbids more."""
    bound = card["bound_by"]
    return f"{card['queries_per_s'][bound] / 1000:,.0f} {bound}"


def modelled(stem: str, options: str = "") -> str:
    """Where the figures of a model come from."""
    about = results(stem)["about"]
    return (
        f"\nThousand queries/s, and what forbids more. `benchmarks/results/{stem}.json` "
        f"({about['date'][:10]}, a model: no GPU was asked): "
        f"`python -m benchmarks.gpu.roofline{options}`\n"
    )


def roofline() -> str:
    """What cannot be exceeded on a GPU: a model."""
    points = results("roofline")["points"]
    cards = list(points[0]["cards"])
    return table(
        ["rows", "ef", "distances", "forgotten and computed again", *cards],
        [
            [
                point["dtype"],
                str(point["ef"]),
                f"{point['distances']:,.0f}",
                f"{100 * point['forgotten']:.1f} %",
                *(bounded(point["cards"][card]) for card in cards),
            ]
            for point in points
        ],
    ) + modelled("roofline")


def counted(stem: str, options: str) -> str:
    """The same, with all that is counted by executing PTX."""
    points = results(stem)["points"]
    cards = list(points[0]["cards"])
    heads = ["rows", "recall", "ef", "distances", "steps", "kB read"]
    return table(
        [*heads, "instructions: a distance, a step", *cards],
        [
            [
                point["dtype"],
                f"{point['recall']:.3f}",
                str(point["ef"]),
                f"{point['distances']:,.0f}",
                f"{point['steps']:.0f}",
                f"{sum(point['bytes'].values()) / 1000:,.0f}",
                ", ".join(f"{point['instructions'][of]:,.0f}" for of in ("distance", "step")),
                *(bounded(point["cards"][card]) for card in cards),
            ]
            for point in points
        ],
    ) + modelled(stem, options)


# ---------------------------------------------------------------- clusters

CLUSTER = "python -m benchmarks.cluster --out benchmarks/results/cluster.json"


def sizes() -> str:
    """What a shard of ten million rows takes."""
    found = results("cluster")

    def gigabytes(value: float) -> str:
        return f"{value * 1e7 / 1e9:.1f}"

    return table(
        ["ten million rows", "memory, GB", "with refine rows left on disk, GB", "on disk, GB"],
        [
            [
                f"{of['dim']}-d, {of['dtype']}" + f" + refine {of['refine']}" * bool(of["refine"]),
                gigabytes(of["bytes_a_row"]),
                gigabytes(of["bytes_a_row"] - of["refine_bytes_a_row"]),
                gigabytes(of["file_bytes_a_row"]),
            ]
            for of in found["sizes"]
        ],
    ) + source("cluster", found["about"], CLUSTER)


def workers() -> str:
    """One worker against more, and against the same machine without Ray."""
    found = results("cluster")
    jobs, search = found["jobs"], found["measured"]
    rates = search["queries_per_s"]
    sides = ("1_workers", "2_workers", "4_workers", "in_process_1_threads", "in_process_2_threads")

    def cells(job: str) -> list[str]:
        seconds = jobs[job]["seconds"]
        one = seconds["1_workers"]
        return [f"{one / seconds[side]:.2f}" for side in sides]

    apart = [median_of(search[name]) for name in ("call_s", "call_in_process_s")]
    beside = search["actor_bytes_beside_shard"]
    more = (
        f"{found['dim']}-d, drawn; a thread a worker. A call of one query takes an actor "
        f"{1e3 * (apart[0] - apart[1]):.1f} ms more; it holds {beside / 2**20:.0f} MiB beside its "
        "shard."
    )
    searches = [f"{rates[side] / rates['1_workers']:.2f}" for side in sides]
    heads = ["one worker", "two", "four", "no Ray, one thread", "no Ray, two threads"]
    return table(
        ["speed, of one worker's", *heads],
        [
            [f"search, {search['rows']:,} rows", *searches],
            *(
                [f"{job}, {jobs['shards']} shards of {jobs['shard_rows']:,} rows", *cells(job)]
                for job in ("build", "dedup")
            ),
        ],
    ) + source("cluster", found["about"], CLUSTER, more)


def driver() -> str:
    """What the process that drives a job, or searches, holds by the rows of it."""
    found = results("cluster")
    jobs = ("build", "dedup", "search")
    return table(
        ["rows, 4-d, in shards of 100,000", *(f"{job}, MiB" for job in jobs)],
        [
            [f"{of['rows']:,}", *(f"{of[job] / 2**20:,.0f}" for job in jobs)]
            for of in found["driver_bytes"]
        ],
    ) + source("cluster", found["about"], CLUSTER, "Python and its packages included.")


def cut() -> str:
    """Recall and distances of one index, and of the same rows in shards."""
    found = results("cluster")
    cells: dict[int, list[str]] = {}
    for of in found["cut"]["results"]:
        cells.setdefault(of["ef"], []).append(f"{of['recall']:.3f}, {of['distances']:,.0f}")
    shards = sorted({of["shards"] for of in found["cut"]["results"]})
    return table(
        ["ef", *("one index" if s == 1 else f"{s} shards" for s in shards)],
        [[str(ef), *row] for ef, row in cells.items()],
    ) + source(
        "cluster",
        found["about"],
        CLUSTER,
        f"Recall@10, distances a query. {SETS['glove']}, {found['cut']['rows']:,} × "
        f"{found['cut']['dim']}.",
    )


def waits() -> str:
    """The model: how long callers wait by the number of shards and replicas."""
    found = results("cluster")
    points = {(p["shard_rows"], p["shards"], p["replicas"]): p for p in found["model"]}
    rows = max(rows for rows, _, _ in points)
    shards = sorted({shards for _, shards, _ in points})
    replicas = sorted({replicas for _, _, replicas in points})
    return table(
        ["shards", *(f"{r} replica{'s' * (r > 1)}" for r in replicas), "bytes sent a query"],
        [
            [str(count)]
            + [
                ", ".join(f"{points[rows, count, r][q] * 1e3:.1f}" for q in ("p50_s", "p99_s"))
                for r in replicas
            ]
            + [f"{points[rows, count, 1]['sent_bytes_a_query']:,}"]
            for count in shards
        ],
    ) + source(
        "cluster",
        found["about"],
        CLUSTER,
        f"A model. Wait for an answer, ms, p50 and p99; shards of {rows:,} rows, of {found['dim']} "
        "dimensions, at 0.7 of what one replica can answer.",
    )


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "race": race,
    "build": build,
    "memory": memory,
    "ef": ef,
    "M": links,
    "ef-construction": ef_construction,
    "rerank": rerank,
    "mapped": mapped,
    "inner-product": inner_product,
    "adding": adding,
    "one-query": one_query,
    "tuning": tuning,
    "dedup": dedup,
    "dedup-thresholds": dedup_thresholds,
    "serving": serving,
    "roofline": roofline,
    "roofline-glove": lambda: counted("roofline", ""),
    "roofline-verses768": lambda: counted(
        "roofline-verses768", " --dataset verses768 --rows 50000"
    ),
    "roofline-synthetic-128": lambda: counted(
        "roofline-synthetic-128", " --dataset synthetic-128 --recall 0.97"
    ),
    "sizes": sizes,
    "workers": workers,
    "driver": driver,
    "cut": cut,
    "waits": waits,
}


@click.command()
def main() -> None:
    """Write the tables of all pages anew."""
    for page in pages():
        text = page.read_text()
        if rendered(text) != text:
            page.write_text(rendered(text))
            click.echo(f"{page.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
