"""graph.check: every planted defect is reported, a sound graph has none, nothing raises."""

import numpy as np
import pytest
import reference

from hnsw_gpu.engine import graph
from hnsw_gpu.engine.graph import Graph

M = 4


@pytest.fixture(scope="module")
def sound() -> Graph:
    vectors = reference.integer_vectors(200, 8, "l2", np.random.default_rng(5))
    made = reference.random_graph(vectors, M, seed=6)
    assert made.top >= 3
    return made


def copied(graph: Graph, **changed: np.ndarray) -> Graph:
    """`graph` with arrays of its own, so that a test may spoil them."""
    return Graph(*(array.copy() for array in graph))._replace(**changed)


def layer_rows(graph: Graph, layer: int) -> slice:
    return slice(int(graph.layer_offsets[layer - 1]), int(graph.layer_offsets[layer]))


def full_row(rows: np.ndarray, at_least: int = 3) -> int:
    """The first row with that many links."""
    return int(np.flatnonzero((rows >= 0).sum(axis=1) >= at_least)[0])


def reports(broken: Graph, *words: str) -> bool:
    """Some problem holds all the words: the planted defect is seen, not one it brought along."""
    return any(all(word in problem for word in words) for problem in graph.check_graph(broken))


# --- sound graphs ---------------------------------------------------------------------------------


def test_sound_graph_has_no_problems(sound: Graph) -> None:
    assert graph.check_graph(sound) == []


@pytest.mark.parametrize("n", [1, 2, 3, 10, 77])
def test_small_sound_graphs_have_no_problems(n: int) -> None:
    vectors = reference.integer_vectors(n, 3, "l2", np.random.default_rng(n))
    for seed in range(10):
        assert graph.check_graph(reference.random_graph(vectors, M, seed)) == []


def flat_graph(neighbors0: list[list[int]]) -> Graph:
    """A graph without upper layers."""
    return Graph(
        neighbors0=np.array(neighbors0, dtype=np.int32).reshape(-1, 2 * M),
        layer_offsets=np.zeros(1, dtype=np.int64),
        nodes=np.zeros(0, dtype=np.int32),
        neighbors=np.zeros((0, M), dtype=np.int32),
        below=np.zeros(0, dtype=np.int32),
    )


def test_graph_without_upper_layers_is_sound() -> None:
    rows = [[(i + 1) % 9, (i + 4) % 9] + [-1] * (2 * M - 2) for i in range(9)]
    assert graph.check_graph(flat_graph(rows)) == []


def test_empty_graph_is_sound() -> None:
    assert graph.check_graph(flat_graph([])) == []


# --- layer 0 --------------------------------------------------------------------------------------


def test_link_out_of_range_on_layer_0(sound: Graph) -> None:
    for bad in (len(sound.neighbors0), np.iinfo(np.int32).max, -2, np.iinfo(np.int32).min):
        broken = copied(sound)
        broken.neighbors0[17, 0] = bad
        assert reports(broken, "layer 0", "17", "out of range"), bad


def test_self_link_on_layer_0(sound: Graph) -> None:
    broken = copied(sound)
    broken.neighbors0[17, 0] = 17
    assert reports(broken, "layer 0", "17", "itself")


def test_repeated_link_on_layer_0(sound: Graph) -> None:
    broken = copied(sound)
    node = full_row(broken.neighbors0)
    # Apart, not side by side: comparing each link with the one before it would miss this.
    broken.neighbors0[node, 2] = broken.neighbors0[node, 0]
    assert reports(broken, "layer 0", str(node), "twice")


def test_hole_in_a_row_on_layer_0(sound: Graph) -> None:
    broken = copied(sound)
    node = full_row(broken.neighbors0)
    used = int((broken.neighbors0[node] >= 0).sum())
    # The first link moves behind the others: nothing is lost, only the order is wrong.
    row = broken.neighbors0[node].copy()
    broken.neighbors0[node] = -1
    broken.neighbors0[node, 1:used] = row[1:used]
    if used < 2 * M:
        broken.neighbors0[node, used] = row[0]
    assert reports(broken, "layer 0", str(node), "hole")


@pytest.mark.parametrize("lost", [0, 120, 199])
def test_node_without_a_link_to_it(sound: Graph, lost: int) -> None:
    broken = copied(sound)
    if lost == broken.entry_point:
        lost += 1
    for row in broken.neighbors0:
        kept = row[(row >= 0) & (row != lost)]
        row[:] = -1
        row[: len(kept)] = kept
    assert (broken.neighbors0 != lost).all()
    assert reports(broken, "layer 0", "1 node", "reachable", str(lost))


def test_two_nodes_that_only_reach_each_other() -> None:
    # Every node has a link to it, yet 7 and 8 are an island.
    rows = [[(i + 1) % 7] + [-1] * (2 * M - 1) for i in range(7)]
    rows += [[8, 0] + [-1] * (2 * M - 2), [7, 1] + [-1] * (2 * M - 2)]
    assert reports(flat_graph(rows), "layer 0", "2 nodes", "reachable", "7")


# --- upper layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2])
def test_link_out_of_range_on_an_upper_layer(sound: Graph, layer: int) -> None:
    part = layer_rows(sound, layer)
    # The layer's own size is the limit: the number is a fine row of `nodes`, or a fine id.
    for bad in (part.stop - part.start, len(sound.nodes), -2, np.iinfo(np.int32).max):
        broken = copied(sound)
        broken.neighbors[part.start + 1, 0] = bad
        assert reports(broken, f"layer {layer}", "out of range"), bad


@pytest.mark.parametrize("layer", [1, 2])
def test_self_link_on_an_upper_layer(sound: Graph, layer: int) -> None:
    broken = copied(sound)
    part = layer_rows(broken, layer)
    local = 1
    row = broken.neighbors[part.start + local]
    row[row == local] = -1
    row[0] = local
    row[1:] = -1
    assert reports(broken, f"layer {layer}", "itself")


@pytest.mark.parametrize("layer", [1, 2])
def test_repeated_link_on_an_upper_layer(sound: Graph, layer: int) -> None:
    broken = copied(sound)
    part = layer_rows(broken, layer)
    rows = broken.neighbors[part]
    row = rows[full_row(rows)]
    row[2] = row[0]
    assert reports(broken, f"layer {layer}", "twice")


@pytest.mark.parametrize("layer", [1, 2])
def test_hole_in_a_row_on_an_upper_layer(sound: Graph, layer: int) -> None:
    broken = copied(sound)
    part = layer_rows(broken, layer)
    rows = broken.neighbors[part]
    rows[full_row(rows), 1] = -1
    assert reports(broken, f"layer {layer}", "hole")


def test_nodes_not_ascending(sound: Graph) -> None:
    for layer in (1, 2):
        at = layer_rows(sound, layer).start
        swapped = copied(sound)
        # `below` follows the swap on layer 1, so only the order is wrong.
        for array in (swapped.nodes, swapped.below):
            array[[at, at + 1]] = array[[at + 1, at]]
        assert reports(swapped, f"layer {layer}", "ascending")
        doubled = copied(sound)
        doubled.nodes[at + 1] = doubled.nodes[at]
        doubled.below[at + 1] = doubled.below[at]
        assert reports(doubled, f"layer {layer}", "ascending")


def test_nodes_out_of_range(sound: Graph) -> None:
    last = layer_rows(sound, 1).stop - 1
    for bad in (len(sound.neighbors0), np.iinfo(np.int32).max):
        broken = copied(sound)
        broken.nodes[last] = broken.below[last] = bad
        assert reports(broken, "layer 1", "below"), bad
    broken = copied(sound)
    broken.nodes[0] = broken.below[0] = -1
    assert reports(broken, "layer 1", "below")


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_below_names_another_node(sound: Graph, layer: int) -> None:
    for bad in (0, 1, 2, -1, len(sound.neighbors0), np.iinfo(np.int32).min):
        broken = copied(sound)
        at = layer_rows(sound, layer).stop - 1
        if broken.below[at] == bad:
            continue
        broken.below[at] = bad
        assert reports(broken, f"layer {layer}", "below"), bad


def test_below_past_the_end_of_its_layer(sound: Graph) -> None:
    # `nodes` goes on behind the layer: the number below leads to the right id, on the wrong layer.
    broken = copied(sound)
    one, two = layer_rows(sound, 1), layer_rows(sound, 2)
    broken.below[two.start] = one.stop - one.start
    assert broken.nodes[broken.below[two.start]] == broken.nodes[two.start]
    assert reports(broken, "layer 2", "below")


def test_node_missing_on_the_layer_below(sound: Graph) -> None:
    broken = copied(sound)
    one, two = layer_rows(sound, 1), layer_rows(sound, 2)
    ids = sound.nodes
    absent = next(
        node
        for node in range(int(ids[two.start]) + 1, int(ids[two.start + 1]))
        if node not in ids[one]
    )
    broken.nodes[two.start] = absent
    assert reports(broken, "layer 2", "below")


# --- shapes and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neighbors0", "layer_offsets", "nodes", "neighbors", "below"])
def test_wrong_dtype(sound: Graph, name: str) -> None:
    array = getattr(sound, name)
    other = np.int32 if array.dtype == np.int64 else np.int64
    for dtype in (other, np.float32, np.uint32, np.int16):
        assert reports(copied(sound, **{name: array.astype(dtype)}), name), dtype


@pytest.mark.parametrize("name", ["neighbors0", "layer_offsets", "nodes", "neighbors", "below"])
def test_wrong_number_of_dimensions(sound: Graph, name: str) -> None:
    array = getattr(sound, name)
    assert reports(copied(sound, **{name: array[None]}), name)
    assert reports(copied(sound, **{name: array.ravel()[:1].reshape(())}), name)


@pytest.mark.parametrize("name", ["nodes", "neighbors", "below"])
def test_lengths_that_disagree(sound: Graph, name: str) -> None:
    array = getattr(sound, name)
    assert reports(copied(sound, **{name: array[:-1]}), "nodes")
    assert reports(copied(sound, **{name: np.concatenate([array, array[-1:]])}), "nodes")
    assert reports(copied(sound, **{name: array[:0]}), "nodes")


def test_widths_that_disagree(sound: Graph) -> None:
    # M0 = 2 M
    wider = np.pad(sound.neighbors0, ((0, 0), (0, 1)), constant_values=-1)
    assert graph.check_graph(copied(sound, neighbors0=wider))
    wider = np.pad(sound.neighbors, ((0, 0), (0, 1)), constant_values=-1)
    assert graph.check_graph(copied(sound, neighbors=wider))


def test_bad_layer_offsets(sound: Graph) -> None:
    good = sound.layer_offsets.tolist()
    bad_ones = {
        "empty": [],
        "does not begin at 0": [1, *good[1:]],
        "negative": [0, -1, *good[2:]],
        "negative first": [-5, *good[1:]],
        "not monotone": [good[0], good[2], good[1], *good[3:]],
        "past the end": [*good[:-1], good[-1] + 1],
        "far past the end": [*good[:-1], 2**62],
        "short of the end": [*good[:-1], good[-1] - 1],
        "top layer left out": good[:-1],
        "huge in the middle": [0, 2**62, *good[2:]],
    }
    for what, offsets in bad_ones.items():
        broken = copied(sound, layer_offsets=np.array(offsets, dtype=np.int64))
        assert reports(broken, "layer_offsets"), what
    empty_layer = [*good[:2], good[1], *good[2:]]
    broken = copied(sound, layer_offsets=np.array(empty_layer, dtype=np.int64))
    assert reports(broken, "layer 2", "no nodes")
