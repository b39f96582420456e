"""Every gate can fail: faults are planted in a copy of the kernels, and each must be caught.

The list FAULTS is the table of which gate finds which: `gate` and, where PTX is executed, `in_ptx`.
The gates: "parity" (keys or hops are not the oracle's), "count" (distances computed are not the
oracle's although nothing was forgotten), "seeds" (two schedules differ), "emulator" (it refuses
what a lane does), and the sanitizers "address" (with undefined behaviour) and "thread".

Each fault runs in a process of its own, because it may do anything.
"""

import concurrent.futures
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import emulated
import emulator
import kernel_cases
import numpy as np
import ptx
import pytest

from hnsw_gpu.engine import vectors as vectors_module
from hnsw_gpu.engine.labels import Labels
from hnsw_gpu.gpu import kernel_source

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SANITIZERS = ("address", "thread")
KINDS = ("plain", *SANITIZERS)
LIMIT_S = 200  # for one fault
NO_FAULT = "no fault"
# Which of these it is can depend on what memory held that a faulty kernel reads.
BY_ANSWER = {"parity", "seeds", "emulator"}


class Fault(NamedTuple):
    """One edit of one file, and the gate that must catch it when `setting` is run.

    in_ptx: what the executor of PTX says, or which answer is not the oracle's.
    """

    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    gate: str
    in_ptx: str
    setting: str = "narrow"


NARROW = {
    "metric": "l2",
    "dtype": "fp32",
    "dim": 31,
    "warps": 1,
    "M": 4,
    "tag_bits": 16,
    "mode": "plain",
    "expand": 4,
    "ef": 64,
    "ef_upper": 4,
    "k": 12,
    "layout": (2, 1),
    "buckets": 32,
}
SETTINGS = {
    "narrow": NARROW,
    "four warps": NARROW | {"warps": 4, "layout": (1, 1)},
    "wide": NARROW | {"M": 16, "expand": 8, "ef": 200},
    "forgetful": NARROW | {"M": 16, "expand": 8, "ef": 200, "buckets": 1},
    "remembering": NARROW | {"buckets": 256},
    "in turn": NARROW | {"layout": (1, 1), "mode": "per query"},
    "self": NARROW | {"mode": "self"},
    "self per query": NARROW | {"mode": "self per query"},
    "int8": NARROW | {"dtype": "int8"},
    "int4": NARROW | {"dtype": "int4"},
    "part of a chunk": NARROW | {"metric": "ip", "dim": 100},
    "odd": NARROW | {"ef": 31, "k": 1, "ef_upper": 1},
    "far": NARROW | {"tag_bits": 32},
    # of the other kernels: the data, and k beyond what there is
    "compare": NARROW | {"k": 100},
    "keys to labels": NARROW | {"k": 100},
    "encode": NARROW | {"dtype": "int4", "dim": 100},
}

FAULTS = [
    # --- order of memory ---
    Fault(
        "keys move before all were read",
        "beam.cuh",
        "        sync_warp();\n        if (i < beam.size) beam.keys[i] = own;",
        "        if (i < beam.size) beam.keys[i] = own;",
        "thread",
        "race",
    ),
    Fault(
        "the beam is read while it is merged",
        "beam.cuh",
        "        if (i < beam.size) beam.keys[i] = own;\n    }\n    sync_warp();",
        "        if (i < beam.size) beam.keys[i] = own;\n    }",
        "seeds",
        "race",
    ),
    Fault(
        "the keys that enter are read before they are written",
        "beam.cuh",
        "is_new ? key : KEY_NONE;\n    sync_warp();",
        "is_new ? key : KEY_NONE;",
        "seeds",
        "race",
    ),
    Fault(
        "the keys that enter are written over before they are read",
        "beam.cuh",
        "    sync_warp();\n    room[lane_number()] = KEY_NONE;",
        "    room[lane_number()] = KEY_NONE;",
        "thread",
        "race",
    ),
    Fault(
        "the room is emptied after a key has entered it",
        "beam.cuh",
        "    room[lane_number()] = KEY_NONE;\n    sync_warp();",
        "    room[lane_number()] = KEY_NONE;",
        "thread",
        "race",
    ),
    Fault(
        "the room is read before a key has entered it",
        "beam.cuh",
        "target < base));\n        sync_warp();",
        "target < base));",
        "thread",
        "race",
    ),
    Fault(
        "picked is read before it is written",
        "beam.cuh",
        "    sync_warp();\n    return count;",
        "    return count;",
        "thread",
        "race",
    ),
    Fault(
        "the stage is read before it is written",
        "search.cu",
        "            staged += __popc(wanted);\n            sync_warp();",
        "            staged += __popc(wanted);",
        "emulator",
        "race",
    ),
    Fault(
        "fresh is read before it is written",
        "search.cu",
        "                sync_group();\n                if (warp == 0) walk.stage(batch, ",
        "                if (warp == 0) walk.stage(batch, ",
        "emulator",
        "race",
    ),
    Fault(
        "fresh keys are written over before they are read",
        "search.cu",
        "if (WARPS == 1) sync_warp();",
        "",
        "thread",
        "race",
    ),
    Fault(
        "fresh is read before other warps wrote it",
        "search.cu",
        "                sync_group();\n                if (warp == 0) walk.stage(batch, ",
        "                sync_warp();\n                if (warp == 0) walk.stage(batch, ",
        "emulator",
        "race",
        "four warps",
    ),
    Fault(
        "the state is read before it is written",
        "search.cu",
        "            sync_group();\n            const int count",
        "            sync_warp();\n            const int count",
        "emulator",
        "race",
        "four warps",
    ),
    Fault(
        "a group is one warp",
        "search.cu",
        "    if (WARPS == 1)\n        sync_warp",
        "    if (true)\n        sync_warp",
        "thread",
        "race",
        "four warps",
    ),
    Fault(
        "the query's number is read before it is drawn",
        "search.cu",
        "        sync_group();\n        const int q",
        "        const int q",
        "emulator",
        "race",
    ),
    Fault(
        "visited is read before it was emptied",
        "visited.cuh",
        "visited.buckets[i] = empty;\n    sync_warp();",
        "visited.buckets[i] = empty;",
        "seeds",
        "race",
    ),
    Fault(
        "a bucket changes hands without a barrier",
        "visited.cuh",
        "            is_waiting = false;\n        }\n        sync_warp();",
        "            is_waiting = false;\n        }",
        "thread",
        "race",
        "forgetful",
    ),
    Fault(
        "rivals for a bucket do not take turns",
        "visited.cuh",
        "is_waiting && lowest(rivals) == lane_number()",
        "is_waiting && rivals",
        "thread",
        "race",
        "forgetful",
    ),
    Fault(
        "queries are drawn without an atomic",
        "search.cu",
        "static_cast<int>(atomicAdd(task.next_query, 1u))",
        "static_cast<int>((*task.next_query)++)",
        "thread",
        "race",
    ),
    # --- lanes ---
    Fault(
        "a lane leaves the merge early",
        "beam.cuh",
        "if (entering == 0) return;",
        "if (!is_new) return;",
        "emulator",
        "deadlock",
    ),
    Fault(
        "a warp of a group leaves early",
        "search.cu",
        "if (q >= task.query_count) return;",
        "if (q >= task.query_count || warp > 1) return;",
        "emulator",
        "bar.sync in a block of which a warp has ended",
        "four warps",
    ),
    Fault(
        "the lanes below include the lane",
        "warp.cuh",
        "(1u << lane_number()) - 1",
        "(2u << lane_number()) - 1",
        "emulator",
        "global load out of bounds",
    ),
    Fault(
        "a team's sum lacks a lane",
        "warp.cuh",
        "const T given = is_upper ? values[i] : values[i + left];",
        "const T given = values[i + left];",
        "parity",
        "keys",
    ),
    # --- beam ---
    Fault(
        "off by one in the merge",
        "beam.cuh",
        "& lanes_below());\n        if (is_moved",
        "& lanes_below()) + 1;\n        if (is_moved",
        "emulator",
        "shared access out of bounds",
    ),
    Fault(
        "a copy enters beside its twin",
        "beam.cuh",
        " && !is_known;",
        ";",
        "parity",
        "keys",
        "forgetful",
    ),
    Fault(
        "copies among the lanes all enter",
        "beam.cuh",
        "is_new = is_new && lowest(copies) == lane_number();",
        "is_new = is_new && copies;",
        "parity",
        "race",
        "forgetful",
    ),
    Fault(
        "ties are broken by luck",
        "beam.cuh",
        "rank += two.y < key;",
        "rank += two.y >> 32 < key >> 32;",
        "parity",
        "race",
    ),
    Fault("the expanded flag is lost", "beam.cuh", "= key | EXPANDED;", "= key;", "parity", "hops"),
    Fault(
        "more are picked than asked for",
        "beam.cuh",
        "is_open && place < expand",
        "is_open && place <= expand",
        "parity",
        "keys",
    ),
    Fault(
        "the first unexpanded key is not found again",
        "beam.cuh",
        "beam.first = min(beam.first, first);",
        "",
        "parity",
        "keys",
    ),
    # --- walk ---
    Fault(
        "the stage is not emptied",
        "search.cu",
        "base + LANES >= count ? 0 :",
        "base + LANES >= count ? 1 :",
        "parity",
        "keys",
    ),
    Fault(
        "the beam outlives its query",
        "search.cu",
        "beam.size = allowed_keys.size = allowed_keys.first = 0;",
        "if (q == 0) beam.size = 0;\n        allowed_keys.size = allowed_keys.first = 0;",
        "emulator",
        "global load out of bounds",
        "in turn",
    ),
    Fault(
        "the allowed list outlives its query",
        "search.cu",
        "beam.size = allowed_keys.size = allowed_keys.first = 0;",
        "beam.size = 0;\n        if (q == 0) allowed_keys.size = allowed_keys.first = 0;",
        "parity",
        "keys",
        "in turn",
    ),
    Fault(
        "layers above are as wide as layer 0",
        "search.cu",
        "const int width = layer ? M : 2 * M;",
        "const int width = 2 * M;",
        "emulator",
        "global load out of bounds",
    ),
    Fault(
        "a neighbour beyond the last",
        "search.cu",
        "if (place < links) {",
        "if (place <= links) {",
        "emulator",
        "global load out of bounds",
    ),
    Fault(
        "the seeds of a layer are expanded already",
        "search.cu",
        "static_cast<uint64>(number) << 1;",
        "static_cast<uint64>(number) << 1 | EXPANDED;",
        "parity",
        "keys",
    ),
    Fault(
        "the seed is not marked visited",
        "search.cu",
        "visit(visited, lane_number() == 0 ? seed : -1);",
        "",
        "count",
        "count",
        "remembering",
    ),
    Fault(
        "the mask is ignored in a self search",
        "search.cu",
        "if (!task.allowed) return true;",
        "if (!task.allowed || task.own) return true;",
        "parity",
        "keys",
        "self per query",
    ),
    Fault(
        "every query has the first one's mask",
        "search.cu",
        "task.allowed + query * task.allowed_stride",
        "task.allowed",
        "parity",
        "keys",
        "in turn",
    ),
    Fault(
        "a node finds itself",
        "search.cu",
        "__ldg(task.own + query) == node) return false;",
        "__ldg(task.own + query) == node) return true;",
        "parity",
        "keys",
        "self",
    ),
    Fault(
        "what misses the beam misses the allowed list",
        "search.cu",
        "is_wanted |= key < worst(allowed_keys)",
        "is_wanted &= key < worst(allowed_keys)",
        "parity",
        "keys",
        "self per query",
    ),
    Fault(
        "what is allowed is counted as blocked",
        "search.cu",
        "!is_allowed(beam.keys[i])",
        "is_allowed(beam.keys[i])",
        "parity",
        "blocked",
        "self per query",
    ),
    # --- visited ---
    Fault(
        "a tag is cut off",
        "visited.cuh",
        "TAG_BITS == 16 ? number >> visited.bucket_bits",
        "TAG_BITS == 16 ? number >> visited.bucket_bits & 7",
        "parity",
        "keys",
        "wide",
    ),
    Fault(
        "a tag has a false twin",
        "visited.cuh",
        "& 0x80008000u;",
        "& 0x80018001u;",
        "parity",
        "keys",
        "wide",
    ),
    # --- memory ---
    Fault(
        "a row's offset has 32 bits",
        "distance.cuh",
        "static_cast<long long>(nodes[r]) * ROW_BYTES",
        "static_cast<int>(static_cast<uint32>(nodes[r]) * ROW_BYTES)",
        "emulator",
        "global load out of bounds",
        "far",
    ),
    Fault(
        "a neighbour row's offset has 32 bits",
        "search.cu",
        "static_cast<long long>(shared.picked[row]) * width",
        "static_cast<int>(static_cast<uint32>(shared.picked[row]) * width)",
        "emulator",
        "global load out of bounds",
        "far",
    ),
    Fault(
        "a query's offset has 32 bits",
        "distance.cuh",
        "static_cast<long long>(q) * QUERY_BYTES",
        "static_cast<int>(static_cast<uint32>(q) * QUERY_BYTES)",
        "emulator",
        "global load out of bounds",
        "far",
    ),
    Fault(
        "a chunk beyond the row is read",
        "distance.cuh",
        "first + TEAM <= CHUNKS || first + member < CHUNKS;",
        "true;",
        "address",
        "global load out of bounds",
        "part of a chunk",
    ),
    Fault(
        "a row that is not there is read",
        "distance.cuh",
        "(nodes[r] >= 0 ? row : query.bytes)",
        "row",
        "address",
        "global load out of bounds",
    ),
    Fault(
        "buckets are not aligned",
        "search.cu",
        "return (count + 1) & ~1;",
        "return count;",
        "address",
        "misaligned shared access",
        "odd",
    ),
    Fault(
        "what meets an int8 row's tail counts",
        "distance.cuh",
        "if (chunk == CHUNKS - 1) part.y = part.z = part.w = 0;",
        "",
        "parity",
        "keys",
        "int8",
    ),
    Fault(
        "the high bits of an int4 row are its low ones",
        "distance.cuh",
        "nibbles(row, 4)",
        "nibbles(row, 0)",
        "parity",
        "keys",
        "int4",
    ),
    # --- the other kernels ---
    Fault(
        "a query is transformed before its signs are there",
        "encode.cu",
        "sign_of(turn * DIM + j));\n        sync_warp();",
        "sign_of(turn * DIM + j));",
        "seeds",
        "race",
        "encode",
    ),
    Fault(
        "a step of the transform begins before the last one ends",
        "encode.cu",
        "        }\n        sync_warp();\n    }\n}",
        "        }\n    }\n}",
        "seeds",
        "race",
        "encode",
    ),
    Fault(
        "pairs are read before they are turned",
        "encode.cu",
        "__fmul_rn(__fsub_rn(a, b), HALF_ROOT);\n    }\n    sync_warp();",
        "__fmul_rn(__fsub_rn(a, b), HALF_ROOT);\n    }",
        "seeds",
        "race",
        "encode",
    ),
    Fault(
        "the kept keys begin with one that nobody wrote",
        "compare.cu",
        "beam.size = beam.first = 0;",
        "beam.size = 1;\n    beam.first = 0;",
        "parity",
        "shared memory is read that was never written",
        "compare",
    ),
    Fault(
        "a share's keys lie in another's place",
        "compare.cu",
        "* gridDim.y + blockIdx.y) * task.k",
        "* gridDim.y) * task.k",
        "parity",
        "race",
        "compare",
    ),
    Fault(
        "the sum over lower lanes lacks its last distance",
        "warp.cuh",
        "distance = 1; distance < LANES;",
        "distance = 1; distance < LANES / 2;",
        "parity",
        "race",
        "keys to labels",
    ),
    Fault(
        "keys of ip hold 1 - dot",
        "distance.cuh",
        "METRIC == IP ? 0.0f : 1.0f;",
        "1.0f;",
        "parity",
        "keys",
        "part of a chunk",
    ),
    Fault(
        "a place after the last label is not filled",
        "keys_to_labels.cu",
        "place = count + lane_number(); place < task.k;",
        "place = count + lane_number() + 1; place < task.k;",
        "parity",
        "keys",
        "keys to labels",
    ),
]

# --- the process that runs one fault --------------------------------------------------------------


def plant(fault: Fault, folder: Path) -> None:
    """A copy of the kernels, with the fault, becomes the kernels."""
    shutil.copytree(kernel_source.folder(), folder)
    text = (folder / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.name}: occurs {text.count(fault.old)} times"
    (folder / fault.file).write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    kernel_source.folder = lambda: folder


class Asked(NamedTuple):
    """A kernel, what it answers by a seed, and what it must answer.

    An answer is of two arrays at most, and of search.cu the distances computed are a third.
    """

    library: emulator.Library
    answer: Callable[[int], tuple[np.ndarray, ...]]
    wanted: tuple[np.ndarray, ...]


def asked_of(setting: str, build) -> Asked:
    row = SETTINGS[setting]
    asked = kernel_cases.question(row)
    made, k = asked.data, asked.settings["k"]
    keys = np.sort(np.array(made.table, np.uint64)[:, :40], axis=1)  # of the first 40 nodes
    if setting == "compare":
        ids = np.arange(40, dtype=np.int32)

        def compare(seed: int) -> tuple[np.ndarray]:
            found = emulated.compare(build, made.rows, made.queries, ids=ids, k=k, seed=seed)
            return (found,)

        none = np.full((len(keys), k - 40), emulated.KEY_NONE)
        return Asked(build.library("compare"), compare, (np.concatenate([keys, none], axis=1),))
    if setting == "keys to labels":
        offsets = np.cumsum([0, *(np.arange(len(made.rows)) % 5)])  # labels a node: none to four
        labels = Labels(offsets, np.arange(offsets[-1]))

        def of_keys(seed: int) -> tuple[np.ndarray, np.ndarray]:
            return emulated.keys_to_labels(build, keys, offsets, labels.packed()[1], k, seed=seed)

        return Asked(build.library("keys_to_labels"), of_keys, labels.keys_to_labels(keys, k))
    if setting == "encode":
        given = (made.vectors[:8], row["metric"], row["dtype"])
        wanted = vectors_module.encode_queries(*given).view(np.uint8)

        def encode(seed: int) -> tuple[np.ndarray]:
            return (emulated.encode(build, made.vectors[:8], wanted.shape[1], seed=seed),)

        return Asked(build.library("encode"), encode, (wanted,))
    if setting == "far":
        asked = asked._replace(settings=asked.settings | {"k": 100})

    def search(seed: int) -> tuple[np.ndarray, ...]:
        if setting == "far":
            return kernel_cases.ask_far(asked, build, seed)
        return asked.ask(build, **kernel_cases.launch_of(row), seed=seed)

    has_allowed_keys = asked.mask is not None or asked.own is not None
    return Asked(build.library("search", has_allowed_keys), search, asked.wanted())


def outcome(fault: Fault, sanitizer: str | None) -> set[str]:
    """The gates that catch it, up to the first that must; a sanitizer ends the process instead."""
    row = SETTINGS[fault.setting]
    asked = asked_of(fault.setting, kernel_cases.build_of(row, sanitizer=sanitizer))
    asked.library.limit_s = 10
    results, gates = [], set()
    for seed in range(2 if sanitizer else 3):
        try:
            found = asked.answer(seed)
        except emulator.KernelError as error:
            print(str(error)[:300], file=sys.stderr)
            gates.add("emulator")
        else:
            results.append(found)
            if not are_equal(found[:2] + found[3:], asked.wanted[:2] + asked.wanted[3:]):
                gates.add("parity")
            if row["buckets"] == 256 and not are_equal(found[2:3], asked.wanted[2:3]):
                gates.add("count")
            if not are_equal(found, results[0]):
                gates.add("seeds")
        if gates & wanted_of(fault):
            break
    return gates


def wanted_of(fault: Fault) -> set[str]:
    """The gates of which one must catch it."""
    return BY_ANSWER if fault.gate in BY_ANSWER else {fault.gate}


def are_equal(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> bool:
    return all(map(np.array_equal, one, other))


def look(name: str, kind: str, folder: Path) -> set[str]:
    """The gates that catch a fault, or NO_FAULT."""
    sanitizer = kind if kind in SANITIZERS else None
    if name != NO_FAULT:
        fault = next(fault for fault in FAULTS if fault.name == name)
        plant(fault, folder / f"kernels with {name}")
        return outcome(fault, sanitizer)
    caught: set[str] = set()
    for setting in sorted({fault.setting for fault in FAULTS if kind_of(fault) == kind}):
        caught |= outcome(Fault("", "", "", "", kind, "", setting), sanitizer)
    return caught


def main(kind: str, folder: str) -> None:
    """Forks a process for each fault of a kind, and one for none; what it says is in the folder."""
    faults = [fault for fault in FAULTS if kind_of(fault) == kind]

    def make_data() -> None:
        for setting in {fault.setting for fault in faults}:
            kernel_cases.question(SETTINGS[setting])  # is kept, for all

    # On a thread that ends: on this one, compiled code would be loaded by another that stays, and
    # ThreadSanitizer says nothing in a process that was forked beside a thread.
    making = threading.Thread(target=make_data)
    making.start()
    making.join()
    # Python's thread ends before the system's, for whose locks a forked process would wait.
    while Path(f"/proc/self/task/{making.native_id}").exists():
        time.sleep(0.001)
    for name in (NO_FAULT, *(fault.name for fault in faults)):
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        place = Path(folder) / name
        os.dup2(os.open(f"{place}.said", os.O_WRONLY | os.O_CREAT), 2)
        faulthandler.register(signal.SIGALRM, chain=True)  # one that hangs says where, and ends
        signal.alarm(LIMIT_S)
        Path(f"{place}.gates").write_text(" ".join(look(name, kind, Path(folder))))
        os._exit(0)


# --- the tests ------------------------------------------------------------------------------------


def kind_of(fault: Fault) -> str:
    """The sanitizer that must catch it, or "plain"."""
    return fault.gate if fault.gate in SANITIZERS else "plain"


def caught_by(kind: str, folder: Path) -> dict[str, set[str]]:
    """By the name of each fault of a kind, and of NO_FAULT, the gates that catch it."""
    folder.mkdir()
    arguments = [str(HERE / "test_planted_faults.py"), kind, str(folder)]
    if kind in SANITIZERS:
        emulator.run_sanitized(kind, *arguments)
    else:
        paths = os.pathsep.join(map(str, (emulator.ROOT, HERE.parent, HERE)))
        environment = {**os.environ, "PYTHONPATH": paths}
        subprocess.run([sys.executable, *arguments], env=environment, timeout=600, check=True)
    caught: dict[str, set[str]] = {}
    for said in folder.glob("*.said"):
        name, gates = said.stem, said.with_suffix(".gates")
        if gates.exists():
            caught[name] = set(gates.read_text().split())
        else:  # the process was ended
            reports = ("AddressSanitizer", "runtime error", "ThreadSanitizer: data race")
            report = said.read_text()
            assert any(words in report for words in reports), report
            caught[name] = {kind}
    return caught


@pytest.fixture(scope="module")
def caught(tmp_path_factory) -> dict[str, "concurrent.futures.Future[dict[str, set[str]]]"]:
    """By kind."""
    folder = tmp_path_factory.mktemp("faults")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {kind: pool.submit(caught_by, kind, folder / kind) for kind in KINDS}


def by_kind(caught, kind: str) -> dict[str, set[str]]:
    if missing := emulator.missing(kind if kind in SANITIZERS else None):
        pytest.skip(missing)
    return caught[kind].result()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault_is_caught(caught, fault) -> None:
    gates = by_kind(caught, kind_of(fault))[fault.name]
    assert gates & wanted_of(fault), f"caught by {sorted(gates) or 'nothing'}"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_caught_without_a_fault(caught, kind) -> None:
    assert by_kind(caught, kind)[NO_FAULT] == set()


# --- in PTX, which is executed in this process: nothing that a kernel does can harm it ------------


def shown_in_ptx(setting: str) -> set[str]:
    """What the executor says of the kernels as they are, and which answers are not the oracle's."""
    row = SETTINGS[setting]
    asked = asked_of(setting, kernel_cases.build_of(row, arch=90))
    shown: set[str] = set()
    for seed in (None, 1, 2):
        try:
            found = asked.answer(seed)
        except emulator.KernelError as error:
            shown |= {line.partition(" (")[0] for line in str(error).splitlines()}
            continue
        answers = {"keys": 0, "hops": 1, "blocked": 3} | (
            {"count": 2} if row["buckets"] == 256 else {}
        )
        shown |= {
            what
            for what, i in answers.items()
            if not are_equal(found[i : i + 1], asked.wanted[i : i + 1])
        }
    return shown


needs_ptx = pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())


@needs_ptx
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault_is_seen_in_ptx(fault, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ptx.launches.STEPS_LIMIT", 50_000_000)
    monkeypatch.setattr(kernel_source, "folder", kernel_source.folder)  # to be put back
    plant(fault, tmp_path / "kernels")
    shown = shown_in_ptx(fault.setting)
    assert any(words.startswith(fault.in_ptx) for words in shown), shown


@needs_ptx
@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_seen_in_ptx_without_a_fault(setting) -> None:
    assert shown_in_ptx(setting) == set()


if __name__ == "__main__":
    main(*sys.argv[1:])
