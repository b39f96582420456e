"""The server's page in a browser: live figures, a query by label, the token, narrow screens."""

import re

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import served
from served import QUERIES, ROWS, running

from hnsw_gpu import Index, load

pytestmark = pytest.mark.slow


@pytest.fixture
def visit(browser):
    """Opens the page of a server; afterwards the browser may not have complained."""
    problems, contexts = [], []

    def visited(fresh, width: int = 1280, **how):
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{fresh.port}/")
        page.problems = problems
        return page

    yield visited
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return served.saved(tmp_path_factory.mktemp("indexes"))


def figures(page) -> dict[str, str]:
    tiles = page.locator("#tiles .card").all()
    return {one.locator("span").inner_text(): one.locator("b").inner_text() for one in tiles}


def wait(page, is_true) -> None:
    for _ in range(100):
        if is_true():
            return
        page.wait_for_timeout(100)
    raise AssertionError(page.locator("main").inner_text())


def test_live_figures(visit, path):
    with running(path) as fresh:
        page = visit(fresh)
        wait(page, lambda: page.locator("#state").inner_text() == "serving version 1")
        assert page.locator("h1").inner_text() == f"docs.hnsw: {ROWS} vectors"
        facts = page.locator("#facts").inner_text()
        assert "cosine" in facts and fresh.live.served.checksum in facts
        wait(page, lambda: figures(page).get("canary recall", "0.000") > "0.9")
        for _ in range(30):
            fresh.call.search(QUERIES)
        fresh.call.search(QUERIES[:, :3])
        wait(page, lambda: figures(page)["queries/s"] != "0")
        shown = figures(page)
        assert float(shown["p50, ms"]) > 0 and shown["errors 5xx"] == "0"
        assert shown["rows a batch"] == "64"
        tops = [bar.text_content() for bar in page.locator("#batches title").all()]
        batches = re.search(r"at most 64 rows: (\d+) batches", " ".join(tops))
        assert batches and int(batches[1]) > 30  # and the canary's, every 15 s
        with fresh.busy():
            wait(page, lambda: page.locator("#latency path").count() == 2)


def test_a_query_by_label(visit, path):
    with running(path) as fresh:
        page = visit(fresh)
        page.locator("#label").fill("17")
        page.locator("#k").fill("4")
        page.get_by_role("button", name="search").click()
        page.locator("#found tr").nth(4).wait_for()
        rows = [row.inner_text().split("\t")[:2] for row in page.locator("#found tr").all()[1:]]
        labels, distances = load(path).search(load(path).vectors([17]), 4)
        assert [int(label) for label, _ in rows] == labels[0].tolist()
        np.testing.assert_allclose([float(d) for _, d in rows], distances[0], atol=1e-5)
        page.problems.clear()
        page.locator("#label").fill("99999")
        page.get_by_role("button", name="search").click()
        wait(page, lambda: "label 99999: not in the index" in page.locator("#wrong").inner_text())
        assert page.locator("#found tr").count() == 0
        refused = [text for text in page.problems if "422" in text]  # Chromium notes every 4xx
        assert page.problems == refused
        page.problems.clear()


def test_labels_that_javascript_rounds(visit, tmp_path):
    index = Index(8, M=8)
    near = 2**53 + 1 + np.arange(20)
    index.add(served.VECTORS[:20], labels=near)
    index.save(tmp_path / "far.hnsw")
    with running(tmp_path / "far.hnsw") as fresh:
        page = visit(fresh)
        page.locator("#label").fill(str(near[4]))
        page.locator("#k").fill("3")
        page.get_by_role("button", name="search").click()
        page.locator("#found tr").nth(3).wait_for()
        rows = [row.inner_text().split("\t")[0] for row in page.locator("#found tr").all()[1:]]
        expected = index.search(served.VECTORS[4], 3).labels[0]
        assert rows == [str(label) for label in expected.tolist()]


def test_the_token_and_a_server_that_stops(visit, path):
    with running(path, token="s3cret") as fresh:
        page = visit(fresh)
        wait(page, lambda: page.locator("#state").inner_text() == "the server asks for its token")
        page.locator("#token").fill("s3cret")
        page.get_by_role("button", name="show").click()
        wait(page, lambda: page.locator("#state").inner_text() == "serving version 1")
        fresh.live.drain()
        wait(page, lambda: page.locator("#state").inner_text() == "the server is stopping")
        assert all("401" in text or "503" in text for text in page.problems), page.problems
        page.problems.clear()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(visit, path, width, scheme):
    with running(path) as fresh:
        page = visit(fresh, width, color_scheme=scheme)
        wait(page, lambda: page.locator("#tiles .card").count() > 8)
        page.get_by_role("button", name="search").click()
        page.locator("#found tr").nth(3).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_asks_nobody_else(visit, path):
    with running(path) as fresh:
        asked = []
        page = visit(fresh)
        page.on("request", lambda request: asked.append(request.url))
        page.reload()
        wait(page, lambda: len(asked) > 3)
        base = f"http://127.0.0.1:{fresh.port}/"
        assert all(url.startswith((base, "data:")) for url in asked)
