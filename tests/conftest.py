"""What tests share: how many run at once, and in which order; and tests of pages, a Chromium."""

import os
import shutil
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LONG = ("test_docs.py", "test_packaging.py")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.hookimpl(optionalhook=True)  # there may be no xdist
def pytest_xdist_auto_num_workers() -> int:
    """Two more than processors: tests of servers and of Ray wait for much of their time."""
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", (os.cpu_count() or 1) + 2))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests run in one process; those of Ray, which wait for it, in one, and first.

    So others compute meanwhile. What takes long and would end the run is second.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = item.path.parent if is_of_ray(item) else item.path
            item.add_marker(pytest.mark.xdist_group(group.relative_to(TESTS).as_posix()))
    items.sort(key=lambda item: (not is_of_ray(item), item.path.name not in LONG))


def is_of_ray(item: pytest.Item) -> bool:
    return item.path.parent == TESTS / "cluster"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
