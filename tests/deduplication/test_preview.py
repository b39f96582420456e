"""The preview beside an exact comparison of all rows."""

import json

import numpy as np
import oracle
import pytest
from click.testing import CliRunner
from test_in_memory import made

from hnsw_gpu import cli
from hnsw_gpu.deduplication import preview

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def path(tmp_path):
    texts = [f"text\n{i}" for i in range(600)]
    table = pyarrow.table({"text": texts, "embedding": list(made())})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    return tmp_path / "a.parquet"


def test_every_row_of_a_sample(path) -> None:
    distances = oracle.distances(made(), made(), "cosine")
    np.fill_diagonal(distances, np.inf)
    nearest = 1 - distances.min(axis=1)
    found = preview.dedup_preview([path], text_column="text", sample=600, examples=7)
    counts, _ = np.histogram(nearest.clip(0, 1 - 1e-9), 50, (0, 1))
    assert np.abs(np.array(found["histogram"]["rows"]) - counts).sum() <= 2  # at the edges
    assert sum(band["rows"] for band in found["bands"]) == found["rows"] == found["sampled"] == 600
    for band in found["bands"]:
        is_in = (nearest >= band["from"] - 1e-6) & (nearest <= band["to"] + 1e-6)
        assert abs(is_in.sum() - band["rows"]) <= 2
        assert len(band["pairs"]) == min(7, band["rows"])
        for pair in band["pairs"]:
            row, other = pair["row"], pair["other"]
            assert row != other
            assert pair["similarity"] == pytest.approx(nearest[row], abs=1e-6)
            assert pair["similarity"] == pytest.approx(1 - distances[row, other], abs=1e-6)
            assert (pair["text"], pair["other_text"]) == (f"text\n{row}", f"text\n{other}")


def test_the_command(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(path.parent)  # a long path would be cut
    path = path.relative_to(path.parent)

    def run(*arguments):
        done = CliRunner().invoke(cli.main, ["dedup-preview", *map(str, arguments)])
        return done.exit_code, done.output

    code, told = run(path, "--sample", 200, "--pairs", 3, "--json")
    found = json.loads(told)
    assert code == 0 and found["sampled"] == 200
    code, text = run(path, "--sample", 200, "--pairs", 3)
    assert "200 of 600 rows, each compared with all others" in text
    first = found["bands"][0]
    assert f"0.98 to 1.00: {first['rows']:,} rows" in text
    assert (
        f"{first['pairs'][0]['similarity']:.4f}  {path}, row {first['pairs'][0]['row']} (" in text
    )
    assert "  text 1" in run(path, "--text-column", "text")[1]
    code, told = run(path, "--text-column", "words")
    assert code == 1 and "no column 'words'" in told
    np.save(tmp_path / "one.npy", np.ones((1, 4)))
    assert run(tmp_path / "one.npy")[0] == 0
    np.save(tmp_path / "bad.npy", np.zeros((3, 4)))
    code, told = run(tmp_path / "bad.npy")
    assert code == 1 and "zero vectors, which have no cosine distance in rows 0, 1, 2" in told
