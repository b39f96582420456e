"""Files of hnswlib and usearch, read without them: as they were written once, and damaged.

The files were written by those libraries:

    PYTHONPATH=.:tests python tests/peers/test_peer_files.py
"""

import struct
from pathlib import Path

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu import CorruptIndexError
from hnsw_gpu.peers import graph_of, read_hnswlib, read_usearch, write_hnswlib

DATA = Path(__file__).parent / "data"
HNSWLIB, USEARCH = DATA / "hnswlib-0.8.0.bin", DATA / "usearch-2.26.6.usearch"
COUNT, DIM, K, EF = 240, 6, 10, 14
LABELS = 7 * np.arange(COUNT) + 3
DELETED = LABELS[5:200:20]
HEADER = "<QQQQQQiIQQQdQ"
RECORD = 4 + 4 * 8 + 4 * DIM + 8  # of M = 4


def rows(count=COUNT, seed=5):
    """Small integers, so that distances are exact; none is zero."""
    found = np.random.default_rng(seed).integers(-20, 21, (count, DIM)).astype(np.float32)
    found[(found == 0).all(axis=1), 0] = 1
    return found


def queries():
    return rows(30, seed=6)


def answers(name):
    """What the library itself answered: labels and distances."""
    with np.load(DATA / "answers.npz") as held:
        return held[f"{name}_labels"], held[f"{name}_distances"]


def of_hnswlib(path=HNSWLIB, **how):
    return hnsw_gpu.from_hnswlib(path, DIM, "l2", device="cpu", **how)


def of_usearch(path=USEARCH):
    return hnsw_gpu.from_usearch(path, device="cpu")


def recall(distances, metric, is_there=slice(None)):
    """Of answers by their distances, ties being no errors."""
    truth = np.sort(oracle.distances(queries(), rows()[is_there], metric), axis=1)[:, K - 1 : K]
    return (distances <= truth + 1e-5).mean()


def test_a_file_of_hnswlib_answers_as_hnswlib_did():
    index, (_, distances) = of_hnswlib(), answers("hnswlib")
    assert not np.isin(index.search(queries(), K, ef=EF).labels, DELETED).any()
    index.undelete(DELETED)
    found = index.search(queries(), K, ef=EF)
    theirs, ours = (recall(far, "l2") for far in (distances, found.distances))
    assert ours >= theirs - 0.002 and 0.9 < theirs < 1
    again = index.search(rows()[5:200:20], 1, ef=EF)
    assert again.distances.max() == 0
    assert (index.M, index.ef_construction, len(index)) == (4, 40, COUNT)


def test_a_file_of_usearch_answers_as_usearch_did():
    index, (_, distances) = of_usearch(), answers("usearch")
    assert index.metric == "cosine"
    found = index.search(queries(), K, ef=EF)
    is_there = ~np.isin(LABELS, DELETED)
    theirs, ours = (recall(far, "cosine", is_there) for far in (distances, found.distances))
    assert abs(ours - theirs) <= 0.01 and theirs > 0.9  # of 300 results
    assert not np.isin(found.labels, DELETED).any()
    assert index.labels.tolist() == LABELS[is_there].tolist() and not len(index.deleted)


def links_of_hnswlib(content):
    """Of each label and layer the labels that it links to, read as plainly as can be."""
    header = struct.unpack_from(HEADER, content)
    count, maxM = header[2], header[8]
    labels, below, found = [], [], {}
    for i in range(count):
        start = 96 + i * RECORD
        (size,) = struct.unpack_from("<H", content, start)
        below.append(struct.unpack_from(f"<{size}I", content, start + 4))
        labels.append(struct.unpack_from("<Q", content, start + RECORD - 8)[0])
    place = 96 + count * RECORD
    for i in range(count):
        (size,) = struct.unpack_from("<I", content, place)
        place += 4
        found[labels[i], 0] = {labels[j] for j in below[i]}
        for layer in range(size // (4 + 4 * maxM)):
            start = place + layer * (4 + 4 * maxM)
            (links,) = struct.unpack_from("<I", content, start)
            there = struct.unpack_from(f"<{links}I", content, start + 4)
            found[labels[i], layer + 1] = {labels[j] for j in there}
        place += size
    return found, labels[header[7]]


def links_of(index):
    """The same of an index."""
    graph, held = index._state.graph, index._state.labels
    label = np.full(len(graph.neighbors0), -1)
    label[np.flatnonzero(held.live_nodes())] = held.packed()[1]
    label[held.deleted.nodes] = held.deleted.labels
    found = {
        (label[node], 0): set(label[links[links >= 0]].tolist())
        for node, links in enumerate(graph.neighbors0)
    }
    for layer in range(1, graph.top + 1):
        part = slice(*graph.layer_offsets[layer - 1 : layer + 1])
        nodes = graph.nodes[part]
        for node, links in zip(nodes, graph.neighbors[part], strict=True):
            found[label[node], layer] = set(label[nodes[links[links >= 0]]].tolist())
    return found, label[graph.entry_point]


def test_every_link_of_every_layer_is_kept(tmp_path):
    links, entry_point = links_of_hnswlib(HNSWLIB.read_bytes())
    assert max(layer for _, layer in links) >= 2
    assert links_of(of_hnswlib()) == (links, entry_point)
    of_hnswlib().to_hnswlib(tmp_path / "again.bin")  # and out again
    assert links_of_hnswlib((tmp_path / "again.bin").read_bytes()) == (links, entry_point)


def test_an_entry_point_that_is_not_the_smallest_node_stays_the_entry_point(tmp_path):
    peer = read_hnswlib(HNSWLIB)
    above = peer.links[-1]
    assert len(above) > 1
    other = peer._replace(entry_point=int(peer.nodes(len(peer.links) - 1)[-1]))
    write_hnswlib(tmp_path / "other.bin", other, 0)
    links, entry_point = links_of_hnswlib((tmp_path / "other.bin").read_bytes())
    assert links_of(of_hnswlib(tmp_path / "other.bin")) == (links, entry_point)


@pytest.mark.parametrize(("dtype", "refine"), [("fp16", None), ("int8", "fp32"), ("int4", None)])
def test_the_vectors_may_be_kept_otherwise(dtype, refine):
    index = of_hnswlib(dtype=dtype, refine=refine)
    found = index.search(queries(), K, ef=EF)
    assert recall(found.distances, "l2", ~np.isin(LABELS, DELETED)) > 0.9
    assert links_of(index) == links_of(of_hnswlib())


def test_a_brought_graph_lives_on(tmp_path):
    """It is saved, loaded, added to and compacted as any other."""
    index = of_hnswlib()
    index.save(tmp_path / "index.hnsw")
    index = hnsw_gpu.load(tmp_path / "index.hnsw", device="cpu")
    assert links_of(index) == links_of(of_hnswlib())
    new = index.add(rows(200, seed=9) + 100)
    assert new[0] == LABELS.max() + 1
    assert index.search(rows(200, seed=9) + 100, 1, ef=EF).distances.max() == 0
    index.compact()
    index.check()
    assert len(index) == COUNT - len(DELETED) + 200


def test_compact_makes_copies_one_node(tmp_path):
    """Copies came as nodes of their own; deleted ones stay where they are asked for."""
    peer = read_hnswlib(HNSWLIB)
    copies = peer._replace(vectors=np.repeat(peer.vectors[::4], 4, axis=0))
    write_hnswlib(tmp_path / "copies.bin", copies, 0)
    index = of_hnswlib(tmp_path / "copies.bin")
    assert index._state.node_count == COUNT
    index.compact(keep_deleted=True)
    distinct = len(np.unique(peer.vectors[::4], axis=0))
    assert index._state.node_count == distinct
    assert index.deleted.tolist() == DELETED.tolist()
    index.undelete(DELETED)
    index.check()
    np.testing.assert_array_equal(index.vectors(LABELS), copies.vectors)


def test_other_numbers_of_links_fit():
    """The smallest M is taken that has room for all links, twice as many on layer 0."""
    peer = read_usearch(USEARCH)
    assert [links.shape[1] for links in peer.links[:2]] == [10, 5]
    wide = np.pad(peer.links[0], ((0, 0), (0, 3)), constant_values=-1)
    wide[0, :13] = np.arange(1, 14)
    graph, _ = graph_of(peer._replace(links=[wide, *peer.links[1:]]))
    assert graph.neighbors0.shape[1] == 14 and graph.neighbors.shape[1] == 7
    with pytest.raises(ValueError, match="M: nodes have 130 links"):
        graph_of(peer._replace(links=[np.pad(wide, ((0, 0), (0, 247))), *peer.links[1:]]))


def test_nodes_that_layer_0_does_not_lead_to_are_told_and_linked(tmp_path, caplog):
    peer = read_hnswlib(HNSWLIB)
    lost = np.flatnonzero(peer.levels == 0)[:3]
    links = np.where(np.isin(peer.links[0], lost), -1, peer.links[0])
    links = -np.sort(-links, axis=1)  # holes to the end
    write_hnswlib(tmp_path / "cut.bin", peer._replace(links=[links, *peer.links[1:]]), 0)
    index = of_hnswlib(tmp_path / "cut.bin")
    assert f"3 of {COUNT} vectors may never be found" in caplog.text
    assert f"label {LABELS[lost[0]]};" in caplog.text and "cut.bin" in caplog.text
    index.undelete(DELETED)
    asked = rows()[lost]
    assert not np.isin(index.search(asked, 5, ef=EF).labels, LABELS[lost]).any()
    index.save(tmp_path / "linked.hnsw")
    index = hnsw_gpu.load(tmp_path / "linked.hnsw", device="cpu")
    assert np.isin(LABELS[lost], index.search(asked, 9, ef=60).labels).all()


def test_links_that_lead_nowhere_new_are_left_out(tmp_path):
    """To the node itself, and the second of two equal ones; all others stay, in order."""
    peer = read_hnswlib(HNSWLIB)
    links = peer.links[0].copy()
    links[7] = [7, 5, 9, 5, 7, 11, -1, -1]
    write_hnswlib(tmp_path / "odd.bin", peer._replace(links=[links, *peer.links[1:]]), 0)
    graph, sorted_peer = graph_of(read_hnswlib(tmp_path / "odd.bin"))
    row = graph.neighbors0[sorted_peer.labels.tolist().index(LABELS[7])]
    found = sorted_peer.labels[row[row >= 0]]
    assert found.tolist() == LABELS[[5, 9, 11]].tolist() and (row[3:] == -1).all()
    of_hnswlib(tmp_path / "odd.bin").check()


# ---------------------------------------------------------------- hostile numbers


def forged(path, at, form, value, tmp_path):
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, value)
    (tmp_path / "forged").write_bytes(content)
    return tmp_path / "forged"


RECORDS_END = 96 + COUNT * RECORD
EXTREMES = {"Q": (0, 1, 2, 2**31, 2**32, 2**63, 2**64 - 1), "I": (COUNT, 2**31, 2**32 - 1)}
FIELDS = [
    ("offset", 0, "Q", EXTREMES["Q"][1:]),
    ("count", 16, "Q", EXTREMES["Q"]),
    ("record bytes", 24, "Q", EXTREMES["Q"]),
    ("label offset", 32, "Q", EXTREMES["Q"]),
    ("vector offset", 40, "Q", EXTREMES["Q"]),
    ("top", 48, "i", (-1, 0, 1, 2**31 - 1, -(2**31))),
    ("entry point", 52, "I", EXTREMES["I"]),
    ("maxM", 56, "Q", EXTREMES["Q"]),
    ("maxM0", 64, "Q", EXTREMES["Q"]),
    ("links", 96, "H", (9, 2**16 - 1)),
    ("a link", 100, "I", EXTREMES["I"]),
    ("a label", 96 + RECORD - 8, "Q", (10, 2**63, 2**64 - 1)),
    ("bytes above", RECORDS_END, "I", (1, 4, 19, 20, 2**31, 2**32 - 1)),
]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field[0])
def test_hostile_numbers_of_hnswlib_are_refused(field, tmp_path):
    _, at, form, values = field
    for value in values:
        path = forged(HNSWLIB, at, "<" + form, value, tmp_path)
        if path.read_bytes() == HNSWLIB.read_bytes():
            continue
        with pytest.raises(CorruptIndexError, match="forged: "):
            of_hnswlib(path)


GRAPH = 8 + COUNT * 2 * DIM + 64
NODES = GRAPH + 40 + 2 * COUNT
USEARCH_FIELDS = [
    ("rows", 0, "I", (0, 1, 2**31, 2**32 - 1)),
    ("bytes a row", 4, "I", (0, 1, 2**31, 2**32 - 1)),
    ("version", GRAPH - 64 + 7, "H", (1, 3)),
    ("metric", GRAPH - 64 + 13, "B", (0, ord("h"))),
    ("numbers", GRAPH - 64 + 14, "B", (0, 1, 23, 255)),
    ("links' kind", GRAPH - 64 + 16, "B", (0, 2)),
    ("dim", GRAPH - 64 + 33, "Q", (0, 1, 2**63)),
    ("multi", GRAPH - 64 + 41, "B", (1,)),
    ("nodes", GRAPH, "Q", (0, 1, 2**63)),
    ("connectivity", GRAPH + 8, "Q", (0, 1, 2**63)),
    ("connectivity_base", GRAPH + 16, "Q", (0, 1, 2**63)),
    ("top", GRAPH + 24, "Q", (0, 2**63)),
    ("entry point", GRAPH + 32, "Q", (COUNT, 2**63)),
    ("a level", GRAPH + 40, "h", (-1, 1000)),
    ("a level of a node", NODES + 8, "h", (-1, 5)),
    ("a key", NODES, "Q", (10, 2**63)),
    ("links", NODES + 10, "I", (14, 2**32 - 1)),
    ("a link", NODES + 14, "I", (COUNT, 2**32 - 1)),
]


@pytest.mark.parametrize("field", USEARCH_FIELDS, ids=lambda field: field[0])
def test_hostile_numbers_of_usearch_are_refused(field, tmp_path):
    _, at, form, values = field
    for value in values:
        path = forged(USEARCH, at, "<" + form, value, tmp_path)
        with pytest.raises(CorruptIndexError, match="forged: "):
            of_usearch(path)


@pytest.mark.parametrize("read", [of_hnswlib, of_usearch])
def test_any_damage_is_refused_or_harmless(read, tmp_path):
    """Bytes changed at random, and cuts: an index that can be searched, or one typed error."""
    source = HNSWLIB if read is of_hnswlib else USEARCH
    content, rng = source.read_bytes(), np.random.default_rng(1)
    refused = 0
    for turn in range(120):
        damaged = bytearray(content)
        if turn % 4 == 0:
            damaged = damaged[: rng.integers(len(content))]
        else:
            for place in rng.integers(len(content) if turn % 4 == 1 else 256, size=turn % 7 + 1):
                damaged[place] = rng.integers(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            index = read(tmp_path / "damaged")
        except ValueError:  # also of vectors that became NaN
            refused += 1
        else:
            index.search(queries(), K, ef=EF)
    assert refused > 30


def test_errors_name_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"hnswlib-0.8.0.bin: holds vectors of 6 numbers, not of"):
        hnsw_gpu.from_hnswlib(HNSWLIB, 7, "l2")
    with pytest.raises(ValueError, match="metric='cosine', and its vectors are not of unit length"):
        hnsw_gpu.from_hnswlib(HNSWLIB, DIM, "cosine")
    with pytest.raises(ValueError, match="metric='l2', and the graph is one of 'cosine'"):
        hnsw_gpu.from_usearch(USEARCH, "l2")
    with pytest.raises(FileNotFoundError):
        hnsw_gpu.from_hnswlib(tmp_path / "none", DIM, "l2")
    for content in (b"", b"x" * 50, b"x" * 5000, USEARCH.read_bytes()):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(CorruptIndexError, match="other: "):
            hnsw_gpu.from_hnswlib(tmp_path / "other", DIM, "l2")
    for content in (b"", b"x" * 50, b"x" * 5000, b"usearch" * 30, HNSWLIB.read_bytes()):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(CorruptIndexError, match="other: "):
            hnsw_gpu.from_usearch(tmp_path / "other")


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_what_goes_out_is_float32(dtype, tmp_path):
    """The finest rows, decoded, each under its label."""
    index = hnsw_gpu.Index(DIM, "cosine", dtype, M=4)
    index.add(rows(), LABELS[::-1])
    index.to_hnswlib(tmp_path / "out.bin")
    peer = read_hnswlib(tmp_path / "out.bin")
    np.testing.assert_array_equal(peer.vectors, index.vectors(peer.labels))
    assert peer.vectors.dtype == np.float32 and sorted(peer.labels) == LABELS.tolist()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_vectors_go_out_and_come_back(count, tmp_path):
    index = hnsw_gpu.Index(DIM, "l2", M=4)
    index.add(rows()[:count])
    index.to_hnswlib(tmp_path / "few.bin")
    again = of_hnswlib(tmp_path / "few.bin")
    assert again.labels.tolist() == index.labels.tolist()
    oracle.assert_same(again.search(queries(), 3), index.search(queries(), 3))


def write_data():
    import hnswlib
    import usearch.index

    for seed in range(1, 100):
        made = hnswlib.Index("l2", DIM)
        made.init_index(COUNT + 20, M=4, ef_construction=40, random_seed=seed)
        made.add_items(rows(), LABELS, num_threads=1)
        made.set_ef(EF)
        made.save_index(str(HNSWLIB))
        if len(read_hnswlib(HNSWLIB).links[-1]) > 1:
            break
    labels, distances = made.knn_query(queries(), K)
    held = {"hnswlib_labels": labels, "hnswlib_distances": distances}
    for label in DELETED:
        made.mark_deleted(label)
    made.save_index(str(HNSWLIB))
    made = usearch.index.Index(
        ndim=DIM, metric="cos", dtype="f16", connectivity=5, expansion_add=40, expansion_search=EF
    )
    made.add(LABELS, rows(), threads=1)
    made.remove(DELETED)
    found = made.search(queries(), K, threads=1)
    held |= {"usearch_labels": found.keys, "usearch_distances": found.distances}
    made.save(str(USEARCH))
    np.savez_compressed(DATA / "answers.npz", **held)


if __name__ == "__main__":
    write_data()
