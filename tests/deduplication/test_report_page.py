"""The page of a report in a browser: its numbers, its slider, hostile texts, narrow screens."""

import json
import re

import numpy as np
import pytest
from test_in_memory import made

from hnsw_gpu import dedup
from hnsw_gpu.deduplication import report as reports
from hnsw_gpu.deduplication import report_page

pytestmark = pytest.mark.slow

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "quotes \" and ' and \\ and \u2028 and \u2029",
    "long " * 1000,
    "\u05d0\u05d1\u05d2 right to left, \U0001f600",
    "",
    None,
]


def report(metric: str = "cosine", rows: np.ndarray | None = None) -> dict:
    """A report as `dedup_files` makes it, of rows in memory."""
    rows = made() if rows is None else rows
    limit = {"threshold": 0.96} if metric == "cosine" else {"max_distance": 0.4}
    found = dedup(rows, metric=metric, method="exact", **limit)
    told = found.report
    told["curve"] = reports.curve(found, 12)
    groups = []
    for head in np.unique(found.duplicate_of[found.duplicate_of >= 0])[:9].tolist():
        members = np.flatnonzero(found.duplicate_of == head).tolist()
        near = [float(found.distance[row]) for row in members]
        name = "distance" if metric == "l2" else "similarity"
        near = near if metric == "l2" else [1 - value for value in near]
        groups.append({
            "id": head, "text": HOSTILE[len(groups) % len(HOSTILE)], "size": len(members) + 1,
            "members": [
                {"id": row, "text": HOSTILE[row % len(HOSTILE)], name: value}
                for row, value in zip(members, near, strict=True)
            ],
        })  # fmt: skip
    told["largest_groups"] = groups
    told["sources"] = [{"path": "a/" * 60 + "b.parquet", "rows": 600, "size": 1, "checksum": "0"}]
    return told


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of a report without a network; afterwards nothing may have gone wrong."""
    problems, contexts = [], []

    def visited(told: dict, width: int = 1280, height: int = 900, **how):
        path = tmp_path / "report.html"
        report_page.write_page(path, told)
        context = browser.new_context(viewport={"width": width, "height": height}, **how)
        contexts.append(context)
        context.set_offline(True)
        context.set_default_timeout(120_000)  # beside other tests it has little of a processor
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith("file:") or problems.append(request.url),
        )
        page.goto(path.as_uri())
        return page

    yield visited
    for context in contexts:
        context.close()
    assert problems == []


def number(page, name: str) -> int:
    return int(page.locator(f"#{name}").inner_text().replace(",", ""))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_slider_shows_what_regroup_says(visit, metric) -> None:
    told = report(metric)
    page = visit(told)
    limit = {"threshold": 0.96} if metric == "cosine" else {"max_distance": 0.4}
    found = dedup(made(), metric=metric, method="exact", **limit)
    for place in (0, 3, len(told["curve"]) - 1, 1):
        page.locator("#slider").fill(str(place))
        at = {name: told["curve"][place][name] for name in limit}
        wanted = found.regroup(**at).report
        for name in ("kept", "near_duplicates", "groups", "pairs"):
            assert number(page, name) == wanted[name]
        value = next(iter(at.values()))
        assert float(page.locator("#limit").inner_text()) == pytest.approx(value, abs=1e-3)
        pale, near = (
            page.eval_on_selector_all("li[data-near]", f"items => items.map(i => {what})")
            for what in ("i.classList.contains('out')", "Number(i.dataset.near)")
        )
        beyond = [one < value if metric == "cosine" else one > value for one in near]
        assert pale == beyond
    assert f"{found.report['kept']} of 600 rows kept" == page.locator("h1").inner_text()


def test_keys_move_the_slider(visit) -> None:
    told = report()
    page = visit(told)
    page.locator("#slider").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert number(page, "kept") == told["curve"][4]["kept"]


def test_hostile_texts_are_texts(visit) -> None:
    told = report()
    page = visit(told)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    for group, details in zip(told["largest_groups"], page.locator("details").all(), strict=True):
        details.locator("summary").click()
        shown = details.inner_text()
        for row in (group, *group["members"]):
            text = row["text"] if row["text"] is not None else str(row["id"])
            assert " ".join(text.split()) in " ".join(shown.split())


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(visit, width, scheme) -> None:
    page = visit(report(), width, 844, color_scheme=scheme)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("rows", [np.empty((0, 4)), np.eye(5)], ids=["no rows", "no pairs"])
def test_little_to_show(visit, rows) -> None:
    page = visit(report(rows=rows))
    assert f"{len(rows)} of {len(rows)} rows kept" in page.locator("h1").inner_text()
    assert "no row has a near-duplicate" in page.locator("#legend").inner_text()


def test_the_page_holds_the_report_and_nothing_of_others(tmp_path) -> None:
    told = report()
    report_page.write_page(tmp_path / "report.html", told)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    held = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert json.loads(held[1]) == json.loads(json.dumps(told))
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    with pytest.raises(ValueError, match="JSON"):
        report_page.write_page(tmp_path / "report.html", {**told, "rows": float("nan")})
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
