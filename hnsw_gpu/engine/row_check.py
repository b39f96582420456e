"""What is wrong with encoded rows (`vectors.py`) that did not come from `encode`, as in a file."""

import numpy as np

from hnsw_gpu.engine.compiled import jit
from hnsw_gpu.engine.distance import TAIL_BYTES
from hnsw_gpu.engine.vectors import engine_view
from hnsw_gpu.engine.workers import run_chunks, thread_count

CHUNK = 4096  # rows that a thread takes at a time
UNIT_ERROR = 1e-3  # of a squared length; an encoder errs by 1e-6
HALF_UNIT_ERROR = 2e-3  # of halves, each of which errs by 2^-11
CODE_ERROR = 0.51  # of a scale: how far an int8 code is from its number
NORM_ERROR = 1e-5  # relative; an encoder rounds twice
TINY = 1e-37  # a norm below loses bits
HALF_EXPONENT = np.uint16(0x7C00)  # all of these bits: NaN or infinite
DEFECTS = (
    "",
    "NaN, infinite or too large values",
    "a scale that is negative or not finite",
    "a sum of codes that is not that of its codes",
    "a norm that is not that of its codes",
    "values in the padding",
    "a length other than 1, which cosine needs",
    "a length that is negative or not finite",
    "a scale that does not fit its codes and its length",
)


def row_problems(name, rows, dim, metric, dtype):
    """What is wrong, in sentences that name the first row, with rows (n, row) of vectors (dim)."""
    kinds = np.zeros(-(-len(rows) // CHUNK), np.int64)
    firsts = np.zeros(len(kinds), np.int64)
    is_unit, view = metric == "cosine", engine_view(rows)

    def look(start, stop):
        if dtype == "int8":
            found = _int8_defect(view, dim, is_unit, start, stop)
        elif dtype == "int4":
            found = _int4_defect(view, dim, is_unit, start, stop)
        elif dtype == "fp16":
            found = _fp16_defect(view, dim, start, stop)
            if is_unit and not found[0]:
                found = _not_unit(rows[start:stop, :dim], start)
        else:
            found = _fp32_defect(view, dim, is_unit, start, stop)
        kinds[start // CHUNK], firsts[start // CHUNK] = found

    run_chunks(look, len(rows), CHUNK, thread_count(None))
    bad = np.flatnonzero(kinds)
    return [f"{name}: row {firsts[i]} has {DEFECTS[kinds[i]]}" for i in bad[:1]]


@jit(fastmath={"reassoc", "contract"})
def _fp32_defect(rows, dim, is_unit, start, stop):
    """Place in DEFECTS and number of the first bad row of start..stop; (0, -1) if there is none."""
    for i in range(start, stop):
        total = np.float32(0)
        for j in range(dim):
            total += rows[i, j] * rows[i, j]
        if not total <= np.float32(3e38):  # NaN is not
            return 1, i
        if is_unit and abs(total - np.float32(1)) > np.float32(UNIT_ERROR):
            return 6, i
        for j in range(dim, rows.shape[1]):
            if rows[i, j] != 0:
                return 5, i
    return 0, -1


@jit
def _fp16_defect(bits, dim, start, stop):
    """As `_fp32_defect`, of float16 as uint16, which no sum of squares makes too large."""
    for i in range(start, stop):
        largest = np.uint16(0)
        for j in range(dim):
            largest = max(largest, bits[i, j] & HALF_EXPONENT)
        if largest == HALF_EXPONENT:
            return 1, i
        for j in range(dim, bits.shape[1]):
            if bits[i, j] != 0:
                return 5, i
    return 0, -1


def _not_unit(halves, start):
    """As `_fp32_defect`, of float16 rows that are fit otherwise: which is not of length 1."""
    floats = halves.astype(np.float32)
    bad = np.abs(np.einsum("ij,ij->i", floats, floats) - 1) > HALF_UNIT_ERROR
    return (6, start + int(bad.argmax())) if bad.any() else (0, -1)


@jit
def _int8_defect(rows, dim, is_unit, start, stop):
    """As `_fp32_defect`, of codes with their tail."""
    end = rows.shape[1] - TAIL_BYTES
    for i in range(start, stop):
        tail = rows[i, end:]
        scale, norm = tail[:4].view(np.float32)[0], tail[4:8].view(np.float32)[0]
        total, squares = np.int32(0), np.int32(0)
        for j in range(dim):  # numba adds int32 as int64, which halves the lanes
            code = np.int32(rows[i, j])
            total = np.int32(total + code)
            squares = np.int32(squares + np.int32(code * code))
        for j in range(dim, end):
            if rows[i, j] != 0:
                return 5, i
        if not 0 <= scale < np.inf:
            return 2, i
        if tail[8:12].view(np.int32)[0] != total:
            return 3, i
        expected = np.float64(scale) * np.float64(scale) * squares
        if not abs(norm - expected) <= NORM_ERROR * expected + TINY:
            return 4, i
        most = UNIT_ERROR + CODE_ERROR * np.float64(scale) * np.sqrt(np.float64(dim))
        if is_unit and abs(np.sqrt(expected) - 1) > most:
            return 6, i
    return 0, -1


@jit
def _int4_defect(rows, dim, is_unit, start, stop):
    """As `_fp32_defect`, of four-bit codes with their tail.

    A decoded row is longer than its vector by one divided by their cosine, whatever the vector: the
    widest step errs by at most 1.01 of what a code stands for, which is half of it at least.
    """
    longest = ((15 + 1.01 * np.sqrt(np.float64(dim))) / 7.5) ** 2
    end = rows.shape[1] - TAIL_BYTES
    for i in range(start, stop):
        tail = rows[i, end:]
        scale, norm = tail[:4].view(np.float32)[0], tail[4:8].view(np.float32)[0]
        total, squares = np.int64(0), np.int64(0)
        for j in range(2 * end):
            code = np.int64(rows[i, j] & 15 if j < end else rows[i, j - end] >> 4)
            if j < dim:
                total += 2 * code - 15
                squares += (2 * code - 15) ** 2
            elif code != 0:
                return 5, i
        if not 0 <= scale < np.inf:
            return 2, i
        if not 0 <= norm < np.inf:
            return 7, i
        if tail[8:12].view(np.int32)[0] != total:
            return 3, i
        decoded = np.float64(scale) * np.float64(scale) * squares
        if not (1 - NORM_ERROR) * norm <= decoded <= longest * norm:
            return 8, i
        if is_unit and abs(norm - np.float32(1)) > np.float32(UNIT_ERROR):
            return 6, i
    return 0, -1
