"""Jobs in processes of their own that have numba ready: forks of one that imported it.

Importing numba and its first compilation are most of what a process does that compiles or loads a
small function. Such a process is the tests' own copy of "a new process": it has not imported the
package.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

STREAMS = ("stdout", "stderr")


class NumbaReady:
    """Runs jobs one after another, each in a fork."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, job: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str, str]:
        """Exit status, and what a job prints and says on stderr; its imports are of `folder`."""
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.TemporaryDirectory() as streams:
            order = [job, str(folder), dict(environment), streams]
            print(json.dumps(order), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            return (status, *((Path(streams) / name).read_text() for name in STREAMS))

    def close(self) -> None:
        self._process.communicate()


def _become(job: str, folder: str, environment: Mapping[str, str], streams: str) -> int:
    """Run a job as a new process would; its exit status."""
    import numba

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    numba.config.reload_config()
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in environment
    sys.path.insert(0, folder)
    for number, name in enumerate(STREAMS, start=1):
        os.dup2(os.open(f"{streams}/{name}", os.O_CREAT | os.O_WRONLY), number)
    try:
        exec(job, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _serve() -> None:
    import numba

    numba.njit(lambda x: x + 1)(1)
    for line in sys.stdin:
        fork = os.fork()
        if not fork:
            os._exit(_become(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
