"""Saved indexes with right checksums and wrong numbers; files that change, linger, do not sync."""

import copy
import errno
import gc
import mmap
import os
import pickle
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from hnsw_gpu import CorruptIndexError, Index, load
from hnsw_gpu.engine.mapped_rows import are_mapped, ask_for
from hnsw_gpu.files import read_arrays, storage, write_arrays

DIM = 21  # rows of every dtype are padded


def rows_of(count, dim=DIM):
    return np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)


def saved(path, **how) -> Index:
    index = Index(DIM, **how)
    index.add(rows_of(300))
    index.save(path)
    return index


def forge(path, name, change) -> None:
    """Change an array of a file, with right checksums."""
    arrays, about = read_arrays(path)
    change(arrays[name])
    write_arrays(path, arrays, about)


# ---------------------------------------------------------------- numbers of a forged file


def put(row, place, value):
    def change(array):
        array[row, place] = value

    return change


def put_tail(row, place, dtype, change_value):
    """Change the number at byte `place` of the 12 that end an int8 row."""

    def change(array):
        tail = array[row, -12:].copy()
        number = tail[place : place + 4].view(dtype)
        number[0] = change_value(number[0])
        array[row, -12:] = tail

    return change


def put_zero_row(row):
    def change(array):
        array[row] = 0

    return change


FLOATS = [
    (put(299, 20, np.nan), "row 299 has NaN, infinite or too large values"),
    (put(0, 0, np.inf), "row 0 has NaN, infinite or too large values"),
    (put(7, 3, -np.inf), "row 7 has NaN, infinite or too large values"),
    (put(12, 21, 1), "row 12 has values in the padding"),
    (put(12, -1, np.nan), "row 12 has values in the padding"),
]
CODES = [
    (put_tail(5, 0, np.float32, lambda x: np.nan), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: np.inf), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: -x), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: 2 * x), "row 5 has a norm that is not that of its codes"),
    (put_tail(9, 4, np.float32, lambda x: np.nan), "row 9 has a norm that is not that of its"),
    (put_tail(9, 4, np.float32, lambda x: x * 1.01), "row 9 has a norm that is not that of its"),
    (put_tail(9, 8, np.int32, lambda x: x + 1), "row 9 has a sum of codes that is not that of"),
    (put(3, 21, 1), "row 3 has values in the padding"),
    (put(3, 4, 99), "row 3 has a (sum of codes|norm) that is not that of its codes"),
]
LENGTH, FITS = "a length that is negative or not", "a scale that does not fit its codes and its"
HALVES = [  # four bits a number: byte 0 holds the first and the last of 21
    (put_tail(5, 0, np.float32, lambda x: np.nan), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: np.inf), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: -x), "row 5 has a scale that is negative or not"),
    (put_tail(5, 0, np.float32, lambda x: x / 2), f"row 5 has {FITS}"),
    (put_tail(5, 0, np.float32, lambda x: 9 * x), f"row 5 has {FITS}"),
    (put_tail(5, 0, np.float32, lambda x: 0), f"row 5 has {FITS}"),
    (put_tail(9, 4, np.float32, lambda x: np.nan), f"row 9 has {LENGTH}"),
    (put_tail(9, 4, np.float32, lambda x: np.inf), f"row 9 has {LENGTH}"),
    (put_tail(9, 4, np.float32, lambda x: -x), f"row 9 has {LENGTH}"),
    (put_tail(9, 4, np.float32, lambda x: 2 * x), f"row 9 has {FITS}"),
    (put_tail(9, 4, np.float32, lambda x: 0), f"row 9 has {FITS}"),
    (put_tail(9, 8, np.int32, lambda x: x + 1), "row 9 has a sum of codes that is not that of"),
    (put(3, 4, 0), "row 3 has a sum of codes that is not that of"),
    (put(3, 1, 0x1F), "row 3 has values in the padding"),
    (put(3, 19, 0x80), "row 3 has values in the padding"),
]
UNIT = (put_tail(4, 4, np.float32, lambda x: x * 0.99), "row 4 has a length other than 1, which co")
FLAT = (put_zero_row(4), "row 4 has a length other than 1, which co")
LARGE = (put(4, 4, 3e20), "row 4 has NaN, infinite or too large values")
LONG = (put(4, 4, 3), "row 4 has a length other than 1, which cosine needs")
FORGED = [
    ({"metric": metric, "dtype": dtype, "refine": refine}, name, *case)
    for metric, dtype, refine, name, cases in (
        ("l2", "fp32", False, "vectors", [*FLOATS, LARGE]),
        ("ip", "fp32", False, "vectors", FLOATS),
        ("cosine", "fp32", False, "vectors", [*FLOATS, LONG]),
        ("l2", "fp16", False, "vectors", FLOATS),
        ("l2", "int8", False, "vectors", CODES),
        ("cosine", "int8", False, "vectors", [*CODES, FLAT]),
        ("cosine", "fp16", False, "vectors", [*FLOATS, LONG]),
        ("l2", "int4", "fp32", "vectors", HALVES),
        ("cosine", "int4", "fp16", "vectors", [*HALVES, UNIT]),
        ("ip", "int4", "fp32", "refine_vectors", FLOATS),
        ("l2", "int8", "fp16", "refine_vectors", FLOATS),
        ("l2", "fp16", "fp32", "refine_vectors", FLOATS),
        ("cosine", "fp16", "fp32", "refine_vectors", [LONG]),
    )
    for case in cases
]


@pytest.mark.parametrize(("how", "name", "change", "message"), FORGED)
def test_numbers_that_no_add_lets_in(tmp_path, how, name, change, message) -> None:
    path = tmp_path / "x.hnsw"
    saved(path, **how)
    load(path).check()
    forge(path, name, change)
    with pytest.raises(CorruptIndexError, match=f"x.hnsw: {name}: {message}"):
        load(path)
    if name == "vectors" and how["refine"]:  # which are in memory
        with pytest.raises(CorruptIndexError, match=f"x.hnsw: {name}: {message}"):
            load(path, mmap=True)
        return
    mapped = load(path, mmap=True)  # reads none of them
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        mapped.check()


@pytest.mark.parametrize("factor", [1e-13, 1e-12, 1, 1e12, 1e17])
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_numbers_of_any_size_that_add_lets_in(tmp_path, factor, dtype, metric) -> None:
    """Whatever `add` takes, `load` does."""
    index = Index(DIM, metric, dtype, refine="fp32" if dtype == "int4" else None)
    rows = rows_of(50) * np.float32(factor)
    rows[0, 1:] = 0  # one code is not 0
    index.add(rows)
    index.save(tmp_path / "x")
    again = load(tmp_path / "x")
    again.check()
    np.testing.assert_array_equal(again.vectors(again.labels), index.vectors(index.labels))


# ---------------------------------------------------------------- mapped files


@pytest.mark.parametrize(
    ("how", "on_disk"),
    [
        ({}, "rows"),
        ({"dtype": "int4"}, "refine_rows"),
        ({"dtype": "int8", "refine": "fp32"}, "refine_rows"),
    ],
)
def test_the_finest_rows_stay_on_disk(tmp_path, how, on_disk) -> None:
    """And the others, which a walk reads, are read and checked at once."""
    expected = saved(tmp_path / "x.hnsw", **how).search(rows_of(9), 5)
    index = load(tmp_path / "x.hnsw", mmap=True, device="cpu")
    cpu = index._state.cpu
    found = {name for name in ("rows", "refine_rows") if hasattr(getattr(cpu, name), "_mmap")}
    assert found == {on_disk}
    for one, other in zip(index.search(rows_of(9), 5), expected, strict=True):
        np.testing.assert_array_equal(one, other)


class Noting(mmap.mmap):
    """A map that notes what it is advised of."""

    def madvise(self, *asked):
        self.asked = [*getattr(self, "asked", []), asked]
        return super().madvise(*asked)


def test_rows_on_disk_are_asked_for_by_page(tmp_path) -> None:
    page = mmap.PAGESIZE
    with open(tmp_path / "x", "w+b") as file:
        file.truncate(20 * page)
        mapped = Noting(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = np.ndarray((40, page // 4), np.uint8, mapped, offset=page + 64).view(np.memmap)
        rows._mmap = mapped
        ask_for(rows[:30], np.array([0, 5, 11]))
        wanted, quarter = mmap.MADV_WILLNEED, page // 4
        assert mapped.asked == [
            (wanted, page, 64 + quarter),
            (wanted, 2 * page, 64 + 2 * quarter),
            (wanted, 3 * page, 64 + 4 * quarter),
        ]
        assert are_mapped(rows[:30]) and not are_mapped(np.array(rows))


USES = {
    "search": lambda index: index.search(rows_of(3), 5),
    "exact_search": lambda index: index.exact_search(rows_of(3), 5),
    "search_radius": lambda index: index.search_radius(rows_of(3), 0.1),
    "neighbor_graph": lambda index: index.neighbor_graph(3),
    "vectors": lambda index: index.vectors([0, 5]),
    "check": lambda index: index.check(),
    "compact": lambda index: index.compact(),
    "add": lambda index: index.add(rows_of(3) + 1),
}


def overwrite(path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\1" * 64)


def cut(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path) -> None:
    path.write_bytes(b"")


def copy_over(path) -> None:
    """As `cp` does: the same file, other bytes, as many of them."""
    path.write_bytes(bytes(path.stat().st_size))


def later(path) -> None:
    """Its time is another one, however coarse the clock of the file system."""
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("change", [overwrite, cut, empty, copy_over])
@pytest.mark.parametrize("use", USES)
def test_a_mapped_file_that_is_changed_in_place(tmp_path, use, change) -> None:
    path = tmp_path / "x.hnsw"
    saved(path, dtype="int8", refine="fp16")
    index = load(path, mmap=True)
    USES["search"](index)
    change(path)
    later(path)
    for _ in range(2):
        with pytest.raises(
            CorruptIndexError, match=r"x.hnsw: was changed in place while it is map"
        ):
            USES[use](index)
    for again in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(CorruptIndexError, match="changed in place"):
            again(index)
    with pytest.raises(CorruptIndexError, match="changed in place"):
        index.save(tmp_path / "y")
    assert not (tmp_path / "y").exists()
    assert index.nbytes > 0 and len(index) == 300  # what is in memory is still there


@pytest.mark.parametrize("change", [overwrite, copy_over])
def test_a_mapped_file_whose_time_is_put_back(tmp_path, change) -> None:
    """As `cp -p` and `rsync` put it; with another mode or one more name it is still served."""
    path = tmp_path / "x.hnsw"
    expected = saved(path).search(rows_of(5), 5)
    index = load(path, mmap=True)
    time.sleep(0.02)  # the clock of a file system is coarse
    path.chmod(0o600)
    os.link(path, tmp_path / "y.hnsw")
    np.testing.assert_array_equal(index.search(rows_of(5), 5).labels, expected.labels)
    before = path.stat().st_mtime_ns
    time.sleep(0.02)
    change(path)
    os.utime(path, ns=(1, before))
    with pytest.raises(CorruptIndexError, match="changed in place while it is mapped"):
        index.search(rows_of(5), 5)


@pytest.mark.parametrize("use", ["search", "exact_search", "search_radius", "vectors"])
def test_a_change_during_a_search_is_not_served(tmp_path, use, monkeypatch) -> None:
    path = tmp_path / "x.hnsw"
    saved(path)
    index = load(path, mmap=True)
    held = index._state.source
    calls = []

    class Changing:
        def require_unchanged(self):
            held.require_unchanged()
            calls.append(1)
            if len(calls) == 1:  # right after it was found to be whole
                overwrite(path)
                later(path)

    index._state = index._state._replace(source=Changing())
    with pytest.raises(CorruptIndexError, match="changed in place"):
        USES[use](index)
    assert calls == [1]


def test_a_change_during_a_save_is_not_saved(tmp_path, monkeypatch) -> None:
    path, copy = tmp_path / "x.hnsw", tmp_path / "y.hnsw"
    saved(path)
    saved(copy, metric="l2")
    before = copy.read_bytes()
    index = load(path, mmap=True)
    header = storage._header

    def late(*given):  # the checksums are made, and nothing is written
        overwrite(path)
        later(path)
        return header(*given)

    monkeypatch.setattr(storage, "_header", late)
    with pytest.raises(CorruptIndexError, match="changed in place"):
        index.save(copy)
    assert copy.read_bytes() == before and temporary(tmp_path) == []


@pytest.mark.parametrize("use", USES)
def test_a_mapped_file_may_be_replaced_or_removed(tmp_path, use) -> None:
    path = tmp_path / "x.hnsw"
    expected = saved(path).search(rows_of(5), 5)
    index = load(path, mmap=True)
    other = Index(DIM)
    other.add(rows_of(100) + 1)
    other.save(path)
    path.rename(tmp_path / "elsewhere.hnsw")
    np.testing.assert_array_equal(index.search(rows_of(5), 5).labels, expected.labels)
    USES[use](index)


def test_what_has_left_the_file_does_not_depend_on_it(tmp_path) -> None:
    for use in (USES["add"], USES["compact"]):
        path = tmp_path / "x.hnsw"
        saved(path)
        index = load(path, mmap=True)
        use(index)
        expected = index.search(rows_of(5), 5)
        cut(path)
        later(path)
        np.testing.assert_array_equal(index.search(rows_of(5), 5).labels, expected.labels)
        index.save(path)
        load(path).check()


def test_no_descriptor_outlives_its_index(tmp_path) -> None:
    path = tmp_path / "x.hnsw"
    saved(path)

    def descriptors():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    load(path, mmap=True).search(rows_of(1), 1)
    before = descriptors()
    for _ in range(5):
        load(path, mmap=True).search(rows_of(1), 1)
        load(path)
    assert descriptors() == before


# ---------------------------------------------------------------- temporary files

KILLED = """
import os, signal, sys
from hnsw_gpu.files import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("written", flush=True)
    sys.stdin.readline()
"""


def writer(path, how):
    command = [sys.executable, "-c", KILLED, str(path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def temporary(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path) -> None:
    for name in ("x.hnsw", "y.hnsw"):
        with writer(tmp_path / name, "kill") as killed:
            assert killed.wait() == -signal.SIGKILL
    assert len(temporary(tmp_path)) == 2
    saved(tmp_path / "x.hnsw")
    (left,) = temporary(tmp_path)  # the other name's
    assert left.startswith(".y.hnsw.")


def test_what_lives_or_is_not_ours_stays(tmp_path) -> None:
    foreign = [
        ".x.hnsw.tmp", "x.hnsw.0123456789abcdef.tmp", ".x.hnsw.0123456789abcdeg.tmp",
        ".x.hnsw.0123456789abcdef.tmp.txt", ".x_hnsw.0123456789abcdef.tmp",
        ".a.x.hnsw.0123456789abcdef.tmp",
    ]  # fmt: skip
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".x.hnsw.00000000000000ff.tmp").mkdir()
    (tmp_path / "aim").write_text("mine")
    (tmp_path / ".x.hnsw.00000000000000fe.tmp").symlink_to(tmp_path / "aim")
    os.mkfifo(tmp_path / ".x.hnsw.00000000000000fd.tmp")
    before = temporary(tmp_path)
    with writer(tmp_path / "x.hnsw", "wait") as other:
        assert other.stdout.readline() == "written\n"
        (live,) = set(temporary(tmp_path)) - set(before)
        saved(tmp_path / "x.hnsw")
        assert temporary(tmp_path) == sorted([*before, live])
        other.stdin.write("\n")
    assert other.returncode == 0 and (tmp_path / "x.hnsw").read_bytes() == b"half"
    assert temporary(tmp_path) == before and (tmp_path / "aim").read_text() == "mine"


def test_a_file_taken_for_abandoned_before_its_lock_is_made_again(tmp_path, monkeypatch) -> None:
    lock, removed = storage.fcntl.flock, []

    def late(file, how):
        if how == storage.fcntl.LOCK_EX and not removed:
            (name,) = temporary(tmp_path)
            removed.append(name)
            (tmp_path / name).unlink()
        lock(file, how)

    monkeypatch.setattr(storage.fcntl, "flock", late)
    saved(tmp_path / "x")
    load(tmp_path / "x").check()
    assert removed and temporary(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch) -> None:
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", none)
    (tmp_path / ".x.0123456789abcdef.tmp").write_text("perhaps being written")
    saved(tmp_path / "x")
    load(tmp_path / "x").check()
    assert temporary(tmp_path) == [".x.0123456789abcdef.tmp"]


# ---------------------------------------------------------------- folders that refuse


@pytest.mark.parametrize("refused", ["open", "fsync", "scandir"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL, errno.EIO])
def test_a_folder_that_refuses_does_not_undo_a_save(
    tmp_path, monkeypatch, caplog, refused, code
) -> None:
    """Mode 0333 (neither opened nor listed); CIFS and FUSE (not synced)."""
    path = tmp_path / "x.hnsw"
    saved(path)
    call = getattr(os, refused)

    def refusing(what, *rest):
        if refused == "fsync":
            is_refused = stat.S_ISDIR(os.fstat(what).st_mode)
        else:
            is_refused = what == str(tmp_path)
        if is_refused:
            raise OSError(code, os.strerror(code))
        return call(what, *rest)

    index = Index(DIM, "l2")
    index.add(rows_of(10))
    with monkeypatch.context() as patched, caplog.at_level("WARNING", "hnsw_gpu"):
        patched.setattr(os, refused, refusing)
        index.save(path)
    assert load(path).metric == "l2" and len(load(path)) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["x.hnsw"]
    said = [record.getMessage() for record in caplog.records]
    if refused == "scandir":
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"{tmp_path}: cannot be synced ({os.strerror(code)})")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_synced(tmp_path, monkeypatch, caplog, code) -> None:
    """Where nothing is ever synced it is logged; a disk that fails leaves the old file."""
    path = tmp_path / "x.hnsw"
    saved(path)
    before = path.read_bytes()
    index = Index(DIM, "l2")
    index.add(rows_of(10))
    call = os.fsync

    def refusing(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        call(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    if code in (errno.EINVAL, errno.ENOSYS):
        with caplog.at_level("WARNING", "hnsw_gpu"):
            index.save(path)
        assert f"{path}: its file system does not sync files" in caplog.text
        assert len(load(path)) == 10
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            index.save(path)
        assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.hnsw"]
