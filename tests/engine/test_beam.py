"""Keys and the beam, held against plain Python on numbers that hypothesis picks."""

import numpy as np
import pytest
import reference

pytest.importorskip("hypothesis", reason="properties are tested with the extra `test`")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hnsw_gpu.engine import beam, jit, keys

FLOATS = st.floats(width=32, allow_nan=False)
NODES = st.integers(0, 2**31 - 1)
# The same examples on every run, and no clock: the first example compiles.
seeded = settings(derandomize=True, deadline=None, max_examples=300)
# Few enough that equal keys and full beams are common.
KEYS = st.one_of(st.integers(0, 40), st.integers(0, reference.KEY_NONE))


# These are called from compiled code only.
@jit
def make_key(distance, node):
    return keys.make_key(distance, node)


@jit
def key_node(key):
    return keys.key_node(key)


@jit
def key_distance(key):
    return keys.key_distance(key)


@jit
def insert(slots, row, capacity, key):
    beam.insert(slots, row, capacity, key)


@jit
def insert_some(slots, row, capacity, entering, count):
    beam.insert_some(slots, row, capacity, entering, count)


@jit
def first_unexpanded(slots, row, start, capacity):
    return beam.first_unexpanded(slots, row, start, capacity)


@jit
def size(slots, row):
    return beam.size(slots, row)


@jit
def set_bytes(slots, row, start, byte):
    beam.set_bytes(slots, row, start, byte)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


# --- R2: keys -------------------------------------------------------------------------------------


@seeded
@given(FLOATS, NODES)
@example(0.0, 0)
@example(-0.0, 2**31 - 1)
@example(float("inf"), 2**31 - 1)
@example(float("-inf"), 0)
@example(-1.401298464324817e-45, 1)
def test_key_gives_back_what_it_was_made_of(distance: float, node: int) -> None:
    key = int(make_key(np.float32(distance), node))
    assert key == reference.key(np.float32(distance), node)
    assert key & int(keys.EXPANDED) == 0
    for flag in (0, 1):
        flagged = np.uint64(key | flag)
        assert int(key_node(flagged)) == node
        assert bits(key_distance(flagged)) == bits(distance)
        assert bits(keys.key_distances(np.array([[flagged]]))[0, 0]) == bits(distance)
        assert keys.key_nodes(np.array([[flagged]])).tolist() == [[node]]


@seeded
@given(FLOATS, NODES, FLOATS, NODES)
@example(0.0, 5, 0.0, 4)
@example(-1.0, 5, -1.0, 4)
@example(-1.0, 4, -2.0, 5)
@example(float("-inf"), 9, -3.4028234663852886e38, 0)
@example(float("inf"), 0, 3.4028234663852886e38, 9)
def test_keys_sort_by_distance_then_id(
    distance: float, node: int, other_distance: float, other_node: int
) -> None:
    key = make_key(np.float32(distance), node)
    other = make_key(np.float32(other_distance), other_node)
    if distance != other_distance:
        assert (key < other) == (distance < other_distance)
    elif bits(distance) == bits(other_distance):
        assert (key < other) == (node < other_node)
        assert (key == other) == (node == other_node)


def test_minus_zero_comes_before_zero() -> None:
    assert make_key(np.float32(-0.0), 7) < make_key(np.float32(0.0), 0)


@seeded
@given(FLOATS, NODES)
@example(float("inf"), 2**31 - 1)
def test_an_empty_slot_is_larger_than_every_key(distance: float, node: int) -> None:
    assert make_key(np.float32(distance), node) | keys.EXPANDED < keys.KEY_NONE


def test_an_empty_slot_reads_as_nothing() -> None:
    held = np.array([keys.KEY_NONE, make_key(np.float32(-2.5), 3)], dtype=np.uint64)
    assert keys.key_nodes(held).tolist() == [-1, 3]
    assert keys.key_nodes(held).dtype == np.int32
    assert keys.key_distances(held).tolist() == [np.inf, -2.5]
    assert keys.key_distances(held).dtype == np.float32


# --- R4: the beam ---------------------------------------------------------------------------------


@seeded
@given(st.integers(0, 20), st.lists(KEYS, max_size=60))
def test_beam_holds_the_smallest_keys(capacity: int, keys: list[int]) -> None:
    marker = 12345  # in slots that insert must leave alone
    slots = np.full((3, capacity + 2), marker, dtype=np.uint64)
    slots[1, :capacity] = reference.KEY_NONE
    for i, key in enumerate(keys):
        insert(slots, 1, capacity, np.uint64(key))
        wanted = sorted(keys[: i + 1])[:capacity]
        empty = [reference.KEY_NONE] * (capacity - len(wanted))
        assert slots[1, :capacity].tolist() == wanted + empty
    assert (slots[1, capacity:] == marker).all()
    assert (slots[[0, 2]] == marker).all()


@seeded
@given(
    st.sampled_from([0, 1, 7, 8, 20, 127, 136, 300, 800]),
    st.lists(st.lists(KEYS, max_size=40), max_size=40),
)
def test_keys_that_enter_together_enter_as_one_by_one(capacity: int, hops: list[list[int]]) -> None:
    marker = 12345
    slots = np.full((3, capacity + 2), marker, dtype=np.uint64)
    slots[1, :capacity] = reference.KEY_NONE
    seen: list[int] = []
    for entering in hops:
        given_keys = np.full(len(entering) + beam.TOGETHER + 1, marker, np.uint64)
        given_keys[: len(entering)] = entering
        insert_some(slots, 1, capacity, given_keys, len(entering))
        assert given_keys[-1] == marker
        seen += entering
        wanted = sorted(seen)[:capacity]
        empty = [reference.KEY_NONE] * (capacity - len(wanted))
        assert slots[1, :capacity].tolist() == wanted + empty
    assert (slots[1, capacity:] == marker).all()
    assert (slots[[0, 2]] == marker).all()


@pytest.mark.parametrize("capacity", [97, 300, 769, 1000])
def test_a_large_beam_holds_the_smallest(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    slots = np.full((1, capacity), reference.KEY_NONE, dtype=np.uint64)
    seen = np.zeros(0, np.uint64)
    while len(seen) < 4 * capacity:
        entering = rng.integers(0, 2**40, rng.integers(0, 40), dtype=np.uint64)
        if len(seen) > capacity and len(entering):
            entering[-1] = slots[0, -1] - np.uint64(1)  # for the last place
        padded = np.concatenate([entering, np.zeros(beam.TOGETHER, np.uint64)])
        insert_some(slots, 0, capacity, padded, len(entering))
        seen = np.sort(np.concatenate([seen, entering]))
        held = min(len(seen), capacity)
        assert (slots[0, :held] == seen[:held]).all()
        assert (slots[0, held:] == reference.KEY_NONE).all()


@seeded
@given(st.integers(1, 40), st.integers(0, 40), st.lists(st.booleans(), max_size=40))
def test_the_first_unexpanded_key_is_found(
    capacity: int, start: int, is_expanded: list[bool]
) -> None:
    flags = (is_expanded + [True] * capacity)[:capacity]  # an empty slot has the flag too
    slots = np.full((2, 48), reference.KEY_NONE, dtype=np.uint64)
    slots[1, : len(is_expanded)] = [2 * i + flag for i, flag in enumerate(is_expanded)]
    start -= start % beam.LANES
    wanted = next((i for i in range(start, capacity) if not flags[i]), capacity)
    assert min(first_unexpanded(slots, 1, start, capacity), capacity) == wanted


@seeded
@given(
    st.integers(1, 12),
    st.lists(st.tuples(FLOATS, st.booleans()), max_size=40),
)
def test_flags_travel_with_their_keys(capacity: int, seen: list[tuple[float, bool]]) -> None:
    # Whether a key is expanded (its lowest bit) does not change which keys stay, nor their order.
    slots = np.full((1, capacity), reference.KEY_NONE, dtype=np.uint64)
    is_expanded = {}
    for node, (distance, expanded) in enumerate(seen):
        is_expanded[node] = expanded
        key = make_key(np.float32(distance), node) | np.uint64(expanded)
        insert(slots, 0, capacity, key)
    kept = slots[0, : len(seen)]
    wanted = sorted(
        (reference.ordered(np.float32(distance)), node) for node, (distance, _) in enumerate(seen)
    )
    assert keys.key_nodes(kept).tolist() == [node for _, node in wanted[:capacity]]
    for key in kept.tolist():
        assert bool(key & 1) == is_expanded[reference.node_of(key)]


@seeded
@given(st.integers(0, 20), st.integers(0, 20))
def test_the_size_is_where_the_empty_slots_begin(held: int, width: int) -> None:
    held = min(held, width)
    slots = np.zeros((3, width), np.uint64)
    slots[1, held:] = reference.KEY_NONE
    assert size(slots, 1) == held


@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
def test_bytes_of_the_end_of_a_row_are_set(dtype: type) -> None:
    slots = np.arange(21, dtype=dtype).reshape(3, 7)
    wanted = slots.copy()
    wanted[1, 4:] = np.iinfo(dtype).max
    set_bytes(slots, 1, 4, 255)
    assert (slots == wanted).all()
    set_bytes(slots, 2, 0, 0)
    wanted[2] = 0
    assert (slots == wanted).all()


@pytest.mark.parametrize("inner", [keys.make_key, beam.insert])
def test_an_inner_function_says_that_it_is_one(inner) -> None:
    """It has no code for callers in Python; without a word that would end the process."""
    with pytest.raises(TypeError, match=f"{inner.__name__} is called from compiled code only"):
        inner(np.zeros((1, 8), np.uint64), 0)
