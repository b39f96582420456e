"""What hnsw_gpu calls of CuPy, for a machine without a GPU: numpy's memory, emulated kernels.

    with cupy_stand_in.installed(free=1 << 30) as machine:  # now `import cupy` gives this module

Work on a stream does not run when it is enqueued, but when someone must have it: the host, by
`synchronize` or a blocking copy, or another stream that waits for an event; and then only what the
stream was given before. So a wait that is missing is a wrong result. Memory is full of 0xCB when it
is new and, in the order of its stream, when its array is dropped: CuPy's pool gives it away then.
Only CuPy's names are here, with the arguments of 14.2 and its errors.
"""

import contextlib
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

import emulator
from hnsw_gpu.gpu import launch_plan

__version__ = "14.2.0"
POISON = 0xCB
DEFAULT_SHARED = 48 * 1024  # bytes a block, unless a kernel asks for more


class Step(NamedTuple):
    """One thing enqueued, or one wait of the host (stream -1 where it waits for no single one)."""

    stream: int
    what: str  # upload, download, copy, zero, sort, kernel name, record, wait, synchronize
    nbytes: int = 0
    event: int = 0


class Launch(NamedTuple):
    """A kernel that was enqueued."""

    kernel: str
    definitions: dict[str, int]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_mem: int


class Machine:
    """The pretended GPU, and the record of what it was told."""

    def __init__(self, free: int, sms: int) -> None:
        self.free, self.total, self.arch = free, 2 * free, 90
        self.limits = launch_plan.of_arch(self.arch)._replace(sms=sms)
        self.live = 0  # bytes of arrays
        self.held: dict[int, list[int]] = {}  # bytes of arrays by stream: now, and at most
        self.steps: list[Step] = []
        self.blocks: list[np.ndarray] = []  # all memory there ever was, so that no address is stale
        self.pinned: list[np.ndarray] = []
        self.streams: dict[int, Stream] = {}
        self.current = threading.local()
        self.launches: list[Launch] = []
        self.seed = 0  # of the order of lanes
        self.gpus = 1
        self.asked: list[int] = []  # the current device, at each question to the pool
        self.nvrtc, self.driver = (13, 0), 13000
        self.null = None

    def hold(self, stream: int, nbytes: int) -> None:
        self.live += nbytes
        now, most = self.held.get(stream, (0, 0))
        self.held[stream] = [now + nbytes, max(most, now + nbytes)]

    def peak(self) -> int:
        """Most bytes so far, as CuPy's pool holds them: what a stream had stays with it."""
        return sum(most for _, most in self.held.values())

    def sum_of(self, what: str) -> int:
        """Bytes of all steps of a kind."""
        return sum(step.nbytes for step in self.steps if step.what == what)

    def names(self) -> list[str]:
        return [step.what for step in self.steps]


machine: Machine = None  # type: ignore[assignment]


@contextlib.contextmanager
def installed(free: int = 1 << 30, sms: int = 1) -> Iterator[Machine]:
    """`import cupy` is this module, on a fresh machine: an H100 of few multiprocessors."""
    global machine
    machine = Machine(free, sms)
    machine.null = Stream(null=True)
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = sys.modules[__name__]
    try:
        yield machine
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before


# --- streams and events ---


class Stream:
    """Operations wait in `ops` until someone needs them."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        assert null or non_blocking, "a blocking stream waits for the null stream: not emulated"
        self.ptr = 0 if null else max(machine.streams) + 16
        self.device_id = -1 if null else _device()
        self.captures = False
        self._ops: list[Callable[[], None]] = []
        self._done = 0
        self._lock = threading.RLock()
        machine.streams[self.ptr] = self

    @classmethod
    def from_external(cls, obj) -> "Stream":
        try:
            version, ptr = obj.__cuda_stream__()
        except AttributeError as error:
            raise TypeError(
                f"Object of type {type(obj).__name__} does not implement "
                "the CUDA stream protocol (__cuda_stream__ method)"
            ) from error
        assert version == 0
        return machine.streams[ptr]

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> "Stream":
        _stack().append(self)
        return self

    def __exit__(self, *error) -> None:
        _stack().pop()

    def is_capturing(self) -> bool:
        return self.captures

    def synchronize(self) -> None:
        machine.steps.append(Step(self.ptr, "synchronize"))
        self.run(len(self._ops))

    def wait_event(self, event: "Event") -> None:
        stream, position = event.place
        self.enqueue("wait", lambda: stream.run(position), event=id(event))

    def record(self, event: "Event") -> "Event":
        event.record(self)
        return event

    def enqueue(self, what: str, run: Callable[[], None], nbytes: int = 0, event: int = 0) -> None:
        with self._lock:
            machine.steps.append(Step(self.ptr, what, nbytes, event))
            self._ops.append(run)

    def run(self, position: int) -> None:
        """Run what was enqueued before `position`."""
        with self._lock:
            while self._done < position:
                self._done += 1
                self._ops[self._done - 1]()


def _stack() -> list[Stream]:
    if not hasattr(machine.current, "stack"):
        machine.current.stack = [machine.null]
    return machine.current.stack


def get_current_stream(device_id: int = -1) -> Stream:
    return _stack()[-1]


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.block = block
        self.place: tuple[Stream, int] = (machine.null, 0)

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        stream.enqueue("record", lambda: None, event=id(self))
        self.place = stream, len(stream._ops)

    def synchronize(self) -> None:
        machine.steps.append(Step(self.place[0].ptr, "synchronize", event=id(self)))
        self.place[0].run(self.place[1])

    @property
    def done(self) -> bool:
        return self.place[0]._done >= self.place[1]


# --- memory ---


class OutOfMemoryError(MemoryError):
    """`cupy.cuda.memory.OutOfMemoryError`."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,})")


class _Block:
    """Device memory. Dropped, it is poisoned in the order of the stream it was allocated on."""

    def __init__(self, nbytes: int) -> None:
        if nbytes > machine.free - machine.live:
            raise OutOfMemoryError(nbytes, machine.live)
        # kernels read 16 bytes at a time, and cudaMalloc aligns to 256
        raw = np.full(nbytes + 256, POISON, np.uint8)
        start = -raw.ctypes.data % 256
        self.bytes = raw[start : start + nbytes]
        self.machine, self.stream, self.device = machine, get_current_stream(), _device()
        machine.blocks.append(raw)
        machine.hold(self.stream.ptr, nbytes)

    def __del__(self) -> None:
        if not hasattr(self, "machine"):
            return  # it was never allocated
        self.machine.hold(self.stream.ptr, -self.bytes.nbytes)
        memory = self.bytes
        with self.stream._lock:
            self.stream._ops.append(lambda: memory.fill(POISON))


class _Data(NamedTuple):
    ptr: int


class ndarray:
    """A device array; `_host` is its memory, which only enqueued operations touch."""

    def __init__(self, host: np.ndarray, block: object) -> None:
        self._host, self._block = host, block

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: self._host.flags)
    device = property(lambda self: Device(getattr(self._block, "device", 0)))
    data = property(lambda self: _Data(self._host.ctypes.data if self._host.size else 0))

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, key) -> "ndarray":
        assert not isinstance(key, (ndarray, np.ndarray)), "only basic slices are emulated"
        return ndarray(self._host[key], self._block)

    def __setitem__(self, key, value: "ndarray") -> None:
        assert isinstance(value, ndarray), "real CuPy takes numpy here only for scalars"
        target, source = self._host, value._host
        place = key._host if isinstance(key, ndarray) else key

        def copy() -> None:
            target[place] = source

        get_current_stream().enqueue("copy", copy, source.nbytes)

    def set(self, arr: np.ndarray, stream: Stream | None = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        # pageable memory is read before the call returns, pinned memory when its turn comes
        target, source = self._host, arr if _is_pinned(arr) else arr.copy()

        def copy() -> None:
            target[...] = source

        (stream or get_current_stream()).enqueue("upload", copy, self.nbytes)

    def get(
        self,
        stream: Stream | None = None,
        order: str = "C",
        out: np.ndarray | None = None,
        blocking: bool = True,
    ) -> np.ndarray:
        if out is not None and (out.dtype, out.shape) != (self.dtype, self.shape):
            raise TypeError(f"{out.dtype} {out.shape} from {self.dtype} {self.shape}")
        assert blocking or _is_pinned(out), "a copy to pageable memory blocks"
        target = np.empty(self.shape, self.dtype) if out is None else out
        source = self._host

        def copy() -> None:
            target[...] = source

        stream = stream or get_current_stream()
        stream.enqueue("download", copy, self.nbytes)
        if blocking:
            stream.synchronize()
        return target

    def copy(self) -> "ndarray":
        result = empty(self.shape, self.dtype)
        result[...] = self
        return result

    def sort(self, axis: int = -1) -> None:
        if not self.flags.c_contiguous:
            raise NotImplementedError("Sorting non-contiguous array is not supported.")
        host = self._host
        # of many rows CuPy sorts pairs of row and key, and Thrust does so out of place
        scratch = empty((3 if self.ndim > 1 else 1) * host.size, np.uint64)
        get_current_stream().enqueue("sort", lambda: host.sort(axis=axis), self.nbytes)
        del scratch

    @property
    def __cuda_array_interface__(self) -> dict:
        strides = None if self.flags.c_contiguous else self._host.strides
        stream = get_current_stream().ptr or 1
        described = {"shape": self.shape, "typestr": self.dtype.str, "strides": strides}
        return {**described, "data": (self.data.ptr, False), "version": 3, "stream": stream}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, **settings) -> "ndarray":
        """In place of a capsule the array. The consumer's stream waits for the producer's."""
        event = Event()
        event.record()
        machine.streams[0 if stream == 1 else stream].wait_event(event)
        return ndarray(self._host, self._block)


def empty(shape, dtype=float) -> ndarray:
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    block = _Block(int(np.prod(shape)) * dtype.itemsize)
    return ndarray(block.bytes.view(dtype).reshape(shape), block)


def zeros(shape, dtype=float) -> ndarray:
    result = empty(shape, dtype)
    host = result._host
    get_current_stream().enqueue("zero", lambda: host.fill(0), result.nbytes)
    return result


def asarray(a, dtype=None) -> ndarray:
    """Of numpy an asynchronous copy; of `__cuda_array_interface__` a view, as CuPy has it."""
    if isinstance(a, ndarray):
        return a if dtype in (None, a.dtype) else ascontiguousarray(a, dtype)
    if hasattr(a, "__cuda_array_interface__"):
        described = a.__cuda_array_interface__
        if described.get("stream") is not None:  # version 3: the host waits for the producer
            machine.streams[0 if described["stream"] == 1 else described["stream"]].synchronize()
        return ndarray(_at(described), a)
    array = np.ascontiguousarray(a, dtype)
    result = empty(array.shape, array.dtype)
    result.set(array.copy())
    return result


def _at(described: dict) -> np.ndarray:
    """The numpy view of device memory at an address."""
    address, dtype = described["data"][0], np.dtype(described["typestr"])
    for raw in machine.blocks:
        offset = address - raw.ctypes.data
        if 0 <= offset < raw.nbytes:
            return np.ndarray(described["shape"], dtype, raw, offset, described["strides"])
    raise ValueError(f"no device memory at {address:#x}")


def from_dlpack(array) -> ndarray:
    assert array.__dlpack_device__()[0] in (2, 13)
    return array.__dlpack__(stream=get_current_stream().ptr or 1, max_version=(1, 0), copy=None)


def ascontiguousarray(a: ndarray, dtype=None) -> ndarray:
    dtype = np.dtype(dtype or a.dtype)
    if a.dtype == dtype and a.flags.c_contiguous:
        return a
    result = empty(a.shape, dtype)
    result[...] = a
    return result


def concatenate(tup, axis: int = 0) -> ndarray:
    tup = list(tup)
    shape = list(tup[0].shape)
    shape[axis] = sum(array.shape[axis] for array in tup)
    result, hosts = empty(shape, tup[0].dtype), [array._host for array in tup]
    target = result._host

    def copy() -> None:
        np.concatenate(hosts, axis=axis, out=target)

    get_current_stream().enqueue("copy", copy, result.nbytes)
    return result


def alloc_pinned_memory(size: int) -> np.ndarray:
    """Larger than asked for, as CuPy's pool gives it."""
    memory = np.full(1 << max(size - 1, 511).bit_length(), POISON, np.uint8)
    machine.pinned.append(memory)
    return memory


def _is_pinned(array: np.ndarray) -> bool:
    return any(np.may_share_memory(array, memory) for memory in machine.pinned)


class _Pool:
    def free_bytes(self) -> int:
        machine.asked.append(_device())
        return 0

    def free_all_blocks(self, stream: Stream | None = None) -> None:
        machine.asked.append(_device())
        machine.steps.append(Step(-1 if stream is None else stream.ptr, "give back"))


def get_default_memory_pool() -> _Pool:
    return _Pool()


# --- kernels ---


_launching = threading.Lock()  # a library that is loaded twice has one scheduler


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        assert isinstance(options, tuple)
        assert sum("-std=c++17" in option for option in options) == 1, options
        pairs = [re.fullmatch(r"-D(\w+)=(\d+)", option) for option in options]
        self._definitions = {pair[1]: int(pair[2]) for pair in pairs if pair}
        assert len(self._definitions) == len(options) - 1, options
        self._code = code

    def get_function(self, name: str) -> "RawKernel":
        library = emulator.compile(name, self._definitions, source=self._code)
        return RawKernel(name, library, self._definitions)


class RawKernel:
    def __init__(self, name: str, library: emulator.Library, definitions: dict[str, int]) -> None:
        self.name, self._library, self._definitions = name, library, definitions
        self.num_regs = 96
        self.max_dynamic_shared_size_bytes = DEFAULT_SHARED
        self.preferred_shared_memory_carveout = -1
        library.max_shared = machine.limits.shared_per_block

    def __call__(self, grid, block, args, *, shared_mem: int = 0) -> None:
        assert isinstance(grid, tuple) and isinstance(block, tuple)
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory")
        copies = [argument.copy() for argument in args]  # the driver takes them before it returns
        for i, argument in enumerate(copies):
            self._library._value(i, argument)  # its type, checked where the caller can be seen
        seed = machine.seed

        def run() -> None:
            with _launching:
                self._library.launch(grid, block, copies, shared_mem=shared_mem, seed=seed)

        launched = Launch(self.name, self._definitions, grid, block, shared_mem)
        machine.launches.append(launched)
        get_current_stream().enqueue(self.name, run)


# --- the device ---


def _devices() -> list[int]:
    if not hasattr(machine.current, "devices"):
        machine.current.devices = [0]
    return machine.current.devices


def _device() -> int:
    """The current one."""
    return _devices()[-1]


class Device:
    def __init__(self, device: int | None = None) -> None:
        self.id = _device() if device is None else device

    def __enter__(self) -> "Device":
        _devices().append(self.id)
        return self

    def __exit__(self, *error) -> None:
        _devices().pop()

    def synchronize(self) -> None:
        machine.steps.append(Step(-1, "synchronize"))
        for stream in list(machine.streams.values()):
            stream.run(len(stream._ops))

    mem_info = property(lambda self: (machine.free - machine.live, machine.total))
    compute_capability = property(lambda self: str(machine.arch))


class CUDARuntimeError(RuntimeError):
    """`cupy.cuda.runtime.CUDARuntimeError`."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(STATUS[status])


STATUS = {
    35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
}


def getDeviceProperties(device: int) -> dict:
    limits = machine.limits
    return {
        "name": b"the emulator",
        "major": machine.arch // 10,
        "minor": machine.arch % 10,
        "multiProcessorCount": limits.sms,
        "sharedMemPerBlockOptin": limits.shared_per_block,
        "sharedMemPerMultiprocessor": limits.shared_per_sm,
        "reservedSharedMemPerBlock": limits.shared_reserved,
        "regsPerMultiprocessor": limits.registers_per_sm,
        "maxThreadsPerMultiProcessor": limits.threads_per_sm,
        "maxBlocksPerMultiProcessor": limits.blocks_per_sm,
    }


cuda = types.SimpleNamespace(
    Device=Device,
    Event=Event,
    Stream=Stream,
    alloc_pinned_memory=alloc_pinned_memory,
    get_current_stream=get_current_stream,
    is_available=lambda: True,
    memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    nvrtc=types.SimpleNamespace(
        getSupportedArchs=lambda: (70, 75, 90) if machine.nvrtc < (13, 0) else (75, 80, 90),
        getVersion=lambda: machine.nvrtc,
    ),
    runtime=types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=lambda: machine.driver,
        getDeviceCount=lambda: machine.gpus,
        getDeviceProperties=getDeviceProperties,
    ),
)
