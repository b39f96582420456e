"""The manual is true: it builds, its blocks run, and its figures are those that were measured."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from pages import MANUAL, README, ROOT, run_page

import hnsw_gpu
from benchmarks.record import RESULTS

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
BUILD = """
import socket, sys

def refuse(*_):
    raise OSError("the manual is built without a network")

socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


def name_of(page) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The manual as HTML, without a warning and without a network."""
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason="the manual is built with the extra `docs`")
    out = tmp_path_factory.mktemp("manual")
    command = [sys.executable, "-c", BUILD, "-q", "-W", "--keep-going", str(DOCS), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def test_it_builds(built):
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in MANUAL}
    assert all((built / page).is_file() for page in pages)
    text = (built / "reference.html").read_text()
    assert "rerank" in text and "how many of the nearest in the beam" in text


def test_the_reference_has_every_public_name():
    told = set(re.findall(r"hnsw_gpu\.(\w+)", (DOCS / "reference.md").read_text()))
    modules = {"hnswlib", "sklearn", "langchain", "llama_index"}
    assert told == {*hnsw_gpu.__all__, *modules} - {"__version__"}


def test_llms_txt_names_every_page(built):
    """By links that lead to Markdown, in the checkout and where the built manual lies."""
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / "llms.txt").read_text())
    reference = {"index.md", "reference.md"}  # which are directives, made of docstrings
    assert set(links) == {str(page.relative_to(DOCS)) for page in MANUAL} - reference
    assert (built / "llms.txt").is_file()
    assert all((built / link).is_file() for link in links)


def test_ten_questions_are_answered():
    """Sphinx proves that the pages and headings which they name are there."""
    text = (DOCS / "questions.md").read_text().split("\n## ")[1]
    rows = [line for line in text.splitlines() if re.match(r"\| [A-Z].*\? \|", line)]
    assert len(rows) == 10
    assert all(re.search(r"\[[^]]+\]\([\w/.-]+\.md(#[\w-]+)?\)", row) for row in rows)


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("page", [README, *MANUAL], ids=name_of)
def test_tables_are_those_of_the_results(page):
    from benchmarks import tables

    text = page.read_text(encoding="utf-8")
    assert text == tables.rendered(text), "run: python -m benchmarks.tables"


def test_the_test_of_tables_can_fail():
    from benchmarks import tables

    text = README.read_text(encoding="utf-8")
    changed = re.sub(r"(?<=\| )\d\.\d(?= \|)", "99.9", text, count=1)
    assert changed != text and tables.rendered(changed) == text
    with pytest.raises(KeyError, match="no-such"):
        tables.rendered("<!-- table: no-such -->\n<!-- end -->\n")


def test_every_table_is_on_a_page_and_names_its_results():
    from benchmarks import tables

    used = [name for page in tables.pages() for name, _ in tables.MARKED.findall(page.read_text())]
    assert sorted(used) == sorted(tables.TABLES)
    for name, make in tables.TABLES.items():
        sources = re.findall(r"`benchmarks/results/([\w.-]+)` \(.+\): `python -m ([\w.]+)", make())
        assert sources, name
        for file, module in sources:
            assert (RESULTS / file).is_file()
            assert find_spec(module), f"{name}: {module}"
