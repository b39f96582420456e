"""What tests share: how many run at once, and in which order; and tests of pages, a Chromium."""

import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest

# Ray's workers would give way to the tests that compute beside those of Ray, and these wait.
os.environ.setdefault("RAY_worker_niceness", "0")
RAY = "tests/cluster/"
LONG = ("tests/test_docs.py", "tests/test_packaging.py")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def pytest_configure(config: pytest.Config) -> None:
    """Under `nohup`, or in the background of a script, Ctrl-C is ignored: not in tests of it.

    What all processes of xdist need is compiled before they start: else each would compile it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    is_first = not hasattr(config, "workerinput")
    if is_first and config.getoption("numprocesses", None):
        warm = "import sys, hnsw_gpu; hnsw_gpu.warm(sys.argv[1:])"
        halves = (("int8", "fp32"), ("int4", "fp16"))  # floats need what int8 needs, too
        for one in [subprocess.Popen([sys.executable, "-c", warm, *half]) for half in halves]:
            one.wait()


@pytest.hookimpl(optionalhook=True)  # there may be no xdist
def pytest_xdist_auto_num_workers() -> int:
    """Two more than processors: tests of servers and of Ray wait for much of their time."""
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", (os.cpu_count() or 1) + 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process; those of Ray, which wait for it, all in the same.

    (xdist 3.8 does not find its own mark for that, `xdist_group`, in pytest 9.2.)
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return RAY if nodeid.startswith(RAY) else str(super()._split_scope(nodeid))

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Ray first, so that others compute meanwhile; then what would end the run."""
    items.sort(key=lambda item: (not item.nodeid.startswith(RAY), not item.nodeid.startswith(LONG)))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
