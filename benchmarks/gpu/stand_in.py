"""CuPy where there is no GPU: the tests' stand-in, with what only the benchmarks call of it.

Its clock is the emulator's and its memory bandwidth is made up: times and ratios mean nothing.
"""

import contextlib
import importlib
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[2] / "tests" / "gpu"
SMS = 2  # so that few queries are enough for every choice of warps
ATTRIBUTES = {"MemoryClockRate": 1_000, "GlobalMemoryBusWidth": 32, "L2CacheSize": 1 << 20}


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """`import cupy` gives the stand-in; RuntimeError where kernels cannot be emulated."""
    sys.path.insert(0, str(TESTS))
    try:
        emulator: Any = importlib.import_module("emulator")
        cupy: Any = importlib.import_module("emulator.cupy_stand_in")
    finally:
        sys.path.remove(str(TESTS))
    if emulator.missing():
        raise RuntimeError(f"the emulated engine needs what is not here: {emulator.missing()}")

    class Event(cupy.Event):  # type: ignore[misc]
        """Knows when its stream came to it."""

        reached = 0.0

        def record(self, stream: Any = None) -> None:
            stream = stream or cupy.get_current_stream()
            stream.enqueue("record", self._stamp, event=id(self))
            self.place = stream, len(stream._ops)

        def _stamp(self) -> None:
            self.reached = time.perf_counter()

    def elapsed(start: Event, end: Event) -> float:
        return 1e3 * (end.reached - start.reached)

    numbers = {f"cudaDevAttr{name}": i for i, name in enumerate(ATTRIBUTES)}
    values = list(ATTRIBUTES.values())
    before, pool_before = cupy.cuda, cupy.get_default_memory_pool
    pool = types.SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda stream=None: None)
    runtime = {
        **vars(before.runtime),
        **numbers,
        "deviceGetAttribute": lambda attribute, device: values[attribute],
        "runtimeGetVersion": lambda: 13000,
    }
    cupy.cuda = types.SimpleNamespace(**{
        **vars(before),
        "Event": Event,
        "get_elapsed_time": elapsed,
        "nvrtc": types.SimpleNamespace(getVersion=lambda: (13, 0)),
        "runtime": types.SimpleNamespace(**runtime),
        "set_allocator": lambda allocator: None,
    })  # fmt: skip
    cupy.get_default_memory_pool = lambda: pool
    try:
        with cupy.installed(sms=SMS) as machine:
            yield machine
    finally:
        cupy.cuda, cupy.get_default_memory_pool = before, pool_before
