"""The demo, run for real on a part of its text, against brute force in float64."""

import json

import numpy as np
import oracle
import pytest

import hnsw_gpu
from hnsw_gpu.demo import verses, walkthrough

pytestmark = pytest.mark.slow

try:
    verses.require((*verses.PACKAGES, "matplotlib"))
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

QUERIES = 300


def is_taken(number):
    """Genesis 1-11, Proverbs 16-18 and Hebrews: about 690 verses of each translation."""
    chapter = number // 1000
    return 1001 <= chapter <= 1011 or 20016 <= chapter <= 20018 or chapter // 1000 == 58


@pytest.fixture(scope="module")
def part():
    rows = [
        (place, number, text)
        for place, package in enumerate(verses.TRANSLATIONS)
        for number, text in verses.read(package).items()
        if is_taken(number)
    ]
    translation, ids, texts = zip(*rows, strict=True)
    return verses.Verses(
        np.array(translation, np.int32),
        np.array(ids, np.int32),
        list(texts),
        verses.embed(list(texts)),
    )


@pytest.fixture(scope="module")
def done(part, tmp_path_factory):
    """(the folder it wrote, the figures it returned)."""
    folder = tmp_path_factory.mktemp("out") / "new" / "folder"
    return folder, walkthrough.run_demo(folder, threads=2, verses=part, query_count=QUERIES)


@pytest.fixture(scope="module")
def sides(part):
    """(rows of `part` in the index, rows asked), chosen here once more."""
    last = np.flatnonzero(part.translation == 4)
    asked = last[[place * len(last) // QUERIES for place in range(QUERIES)]]
    return np.flatnonzero(part.translation < 4), asked


@pytest.fixture(scope="module")
def truth(part, sides):
    """Distances (queries, indexed)."""
    indexed, asked = sides
    return oracle.distances(part.vectors[asked], part.vectors[indexed], "cosine")


def test_hold_out(part, sides):
    base, asked = walkthrough.hold_out(part, QUERIES)
    indexed_rows, asked_rows = sides
    assert base.texts == [part.texts[row] for row in indexed_rows]
    assert asked.texts == [part.texts[row] for row in asked_rows]
    np.testing.assert_array_equal(asked.vectors, part.vectors[asked_rows])
    everything = walkthrough.hold_out(part, 10**6)[1]
    assert everything.texts == [part.texts[row] for row in np.flatnonzero(part.translation == 4)]


def test_the_index_is_kept(part, sides, done):
    folder, figures = done
    indexed, _ = sides
    index = hnsw_gpu.load(folder / "verses.hnsw")
    np.testing.assert_array_equal(index.labels, np.arange(len(indexed)))
    stored = index.vectors(index.labels)
    np.testing.assert_allclose(stored, oracle.unit(part.vectors[indexed]), rtol=0, atol=1e-6)
    assert figures["indexed"] == len(indexed)
    assert figures["index_bytes"] == index.nbytes
    assert figures["dim"] == 256


def test_recall_is_what_brute_force_says(part, sides, truth, done):
    folder, figures = done
    _, asked = sides
    index = hnsw_gpu.load(folder / "verses.hnsw")
    assert [point["ef"] for point in figures["sweep"]] == [16, 32, 64, 128, 256]
    for point in figures["sweep"]:
        found = index.search(part.vectors[asked], 10, ef=point["ef"]).labels
        assert point["recall"] == pytest.approx(oracle.recall(found, truth, 10), abs=1e-9)
        assert point["queries_per_s"] > 0
    assert figures["sweep"][0]["recall"] > 0.8
    assert figures["sweep"][-1]["recall"] > 0.99


def right_share(distances, right, usable):
    """(least, most) share of rows whose nearest usable column is right, over float32 rounding."""
    distances = np.where(usable, distances, np.inf)
    is_nearest = usable & (distances <= distances.min(axis=1, keepdims=True) + 1e-6)
    surely = (is_nearest <= (is_nearest & right)).all(axis=1) & is_nearest.any(axis=1)
    return surely.mean(), (is_nearest & right).any(axis=1).mean()


def test_same_verse_from_outside(part, sides, truth, done):
    _, figures = done
    indexed, asked = sides
    right = part.ids[asked][:, None] == part.ids[indexed]
    _, most = right_share(truth, right, np.full(truth.shape, True))
    # a copy of the nearest has its vector, so its distance to the last bit: it always counts
    assert figures["same_verse"]["outside_exact"] == pytest.approx(most, abs=1.5 / QUERIES)
    assert figures["same_verse"]["outside"] == pytest.approx(most, abs=3.5 / QUERIES)
    assert 0.9 < most < 1  # some verses are found, some are not: the figure says something


def test_same_verse_from_inside(part, sides, done):
    _, figures = done
    indexed, _ = sides
    ids, texts = part.ids[indexed], np.array(part.texts)[indexed]
    distances = oracle.distances(part.vectors[indexed], part.vectors[indexed], "cosine")
    usable = texts[:, None] != texts
    right = ids[:, None] == ids
    counted = (usable & right).any(axis=1)
    least, most = right_share(distances[counted], right[counted], usable[counted])
    assert least - 0.005 <= figures["same_verse"]["inside"] <= most + 0.005
    assert least > 0.8
    assert most < 1


def test_examples(part, sides, done):
    _, figures = done
    indexed, _ = sides
    examples = figures["examples"]
    names = ["Genesis 1:3", "Proverbs 16:18", "Hebrews 11:1"]
    assert [example["source"] for example in examples] == [
        f"{name}, World English 1997" for name in names
    ]
    for example in examples:
        (row,) = [
            row
            for row in np.flatnonzero(part.translation == 4)
            if part.texts[row] == example["text"]
        ]
        distances = oracle.distances(part.vectors[[row]], part.vectors[indexed], "cosine")
        _, nearest = oracle.nearest(distances, 6)
        found = example["found"]
        far = [neighbor["distance"] for neighbor in found]
        np.testing.assert_allclose(far, nearest[0], rtol=0, atol=1e-6)
        for neighbor in found:
            rows = [row for row in indexed if part.source(row) == neighbor["source"]]
            assert [part.texts[row] for row in rows] == [neighbor["text"]]
            assert distances[0, rows[0]] == pytest.approx(neighbor["distance"], abs=1e-6)


def test_what_is_printed_is_what_is_returned(part, tmp_path, capsys):
    figures = walkthrough.run_demo(tmp_path, threads=1, verses=part, query_count=50)
    printed, noise = capsys.readouterr()
    assert noise == ""  # no bars where nobody watches
    lines = [line.strip() for line in printed.splitlines()]
    for point in figures["sweep"]:
        ef, recall, speed = point["ef"], point["recall"], point["queries_per_s"]
        assert f"{ef} {recall:.4f} {speed:,.0f}" in [" ".join(line.split()) for line in lines]
    for example in figures["examples"]:
        assert f"{example['source']}: {example['text']}" in lines
        for neighbor in example["found"]:
            start = f"{neighbor['distance']:.3f}  {neighbor['source']}"
            assert any(line.startswith(start) for line in lines)
    for share in figures["same_verse"].values():
        assert f"{share:.1%}" in printed
    for name in ("verses.hnsw", "recall.png", "figures.json"):
        assert str(tmp_path / name) in printed
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved == {"made_by": "hnsw-gpu demo"} | figures
    assert figures["queries"] == 50
    assert figures["threads"] == 1


def test_the_first_answer_comes_from_the_first_bible(part, tmp_path, capsys):
    """Nearest by brute force; before the others are indexed."""
    figures = walkthrough.run_demo(tmp_path, threads=2, verses=part, query_count=5)
    before, after = capsys.readouterr().out.split("First answer, ")
    assert "2/6" in before
    answer = [line.strip() for line in after.split("3/6")[0].splitlines()]
    indexed = np.flatnonzero(part.translation == 0)
    assert answer[0].endswith(f"from {len(indexed):,} verses:")
    (row,) = np.flatnonzero((part.translation == 4) & (part.ids == walkthrough.EXAMPLES[0]))
    assert answer[1] == f"{part.source(row)}: {part.texts[row]}"
    distances = oracle.distances(part.vectors[[row]], part.vectors[indexed], "cosine")
    (nearest,), ((distance,),) = oracle.nearest(distances, 1)
    assert answer[2].startswith(f"{distance:.3f}  {part.source(indexed[nearest[0]])}  ")
    assert figures["seconds"]["first_answer"] > 0


def test_the_plot_is_a_picture(done):
    from matplotlib.image import imread

    folder, _ = done
    picture = imread(folder / "recall.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 600
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20  # and not blank


def test_is_right():
    ids = np.array([7, 8, 7, 9])
    answer = hnsw_gpu.SearchResult(
        labels=np.array([[0, 1, 2], [1, 0, 3], [1, 3, -1], [3, 0, 1], [-1, -1, -1]]),
        distances=np.array(
            [[0.1, 0.2, 0.3], [0.1, 0.1, 0.3], [0.1, 0.2, np.inf], [0, 0.1, 0.2], [np.inf] * 3],
            np.float32,
        ),
    )
    usable = answer.labels >= 0
    usable[3, 0] = False  # the same words: passed over
    asked = np.array([7, 7, 9, 7, 9])
    # nearest; one of two equally near; only the second; after the copy; nothing (-1 is no row)
    np.testing.assert_array_equal(
        walkthrough.is_right(asked, ids, answer, usable), [True, True, False, True, False]
    )


def test_is_right_in_other_words():
    texts = ["a", "a", "b", "a", "c", "d", "e"]
    ids = np.array([1, 1, 1, 2, 2, 3, 1])
    labels = np.array(
        [
            [1, 3, 6, 2],  # two copies are passed over; then verse 1
            [0, 3, 4, 2],  # the same; then verse 2
            [6, 0, 1, 3],  # verse 1 at once
            [0, 1, -1, -1],  # nothing but copies among the neighbours: not found
            [5, 3, 0, 1],  # verse 3 is nearer than verse 2
            [4, 2, 0, 1],  # does not count: no other wording of verse 3 exists
            [0, 1, 3, 2],  # three at one distance, two of them verse 1
        ]
    )
    distances = np.tile(np.arange(4, dtype=np.float32), (7, 1))
    distances[6, :3] = 0
    graph = hnsw_gpu.SearchResult(labels, distances)
    np.testing.assert_array_equal(
        walkthrough.is_right_in_other_words(ids, texts, graph),
        [True, False, True, False, False, True],
    )
