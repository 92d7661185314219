"""One GPU: its memory, one stream, copies and graphs. The only file of this room that talks to CuPy besides kernels.py.

What a step enqueues goes through the driver (launch.py), which keeps Python's lock: CuPy's copies and launches give it up, and
where another thread computes in Python, each of them then takes five milliseconds to get it back. (Beside such a thread, 64
sequences of the 1B shape made 1,300 tokens a second so, and make 4,600; waiting for the device and for work still gives the lock
up.)

Memory is taken with plain allocations and given back when the device is closed. Everything is enqueued on one stream, so what
is written before is seen by what comes after, and one `synchronize` per step is all the waiting there is.
`tests/gpu/numpy_executor.py` has a twin over host memory, with which the whole room is tested where there is no GPU.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from infer._core import InferError
from infer.gpu.launch import check, driver

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

INSTALL = "install the GPU's libraries with `pip install 'infer[cuda13]'`, or `'infer[cuda12]'` for drivers before 580"
WORKSPACE_BYTES = 32 << 20  # of matrix products; what cuBLASLt wants on Hopper
UNPACKED_BYTES = 256 << 20  # ... and of products of many rows with weights of few bits: rounded rows, or unpacked weights
LEAST_DRIVER = 12000  # CUDA 12
LEAST_CAPABILITY = 80  # bfloat16 and cp.async
BRIEF_BYTES = 1 << 20  # of copies that are enqueued, or made, in no time
FUNCTIONS = (
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuGraphLaunch",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
)
"""Of the driver, that rust/bindings/src/driver.rs calls."""
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


def require() -> Any:
    """Return the module `cupy`, with a GPU that can be used; `InferError` says what is missing."""
    try:
        import cupy
        from cupy.cuda import runtime
    except ImportError as error:
        raise InferError(f"device: 'cuda' needs CuPy ({error}); {INSTALL}") from error
    try:
        count, version = runtime.getDeviceCount(), runtime.driverGetVersion()
    except runtime.CUDARuntimeError as error:
        raise InferError(f"device: 'cuda' finds no usable NVIDIA GPU or driver ({error}); use device='cpu'") from error
    if count == 0:
        raise InferError("device: 'cuda' finds no NVIDIA GPU; use device='cpu'")
    if version < LEAST_DRIVER:
        found = f"this one is for {version // 1000}"
        raise InferError(f"device: 'cuda' needs a driver for CUDA 12 or later, {found}; update the driver")
    properties = runtime.getDeviceProperties(runtime.getDevice())
    capability = properties["major"] * 10 + properties["minor"]
    if capability < LEAST_CAPABILITY:
        name = properties["name"].decode()
        raise InferError(f"device: 'cuda' needs compute capability 8.0 or later, {name} has {capability / 10}; use device='cpu'")
    return cupy


class Device:
    """The current GPU. One thread at a time may use it, after `use`."""

    name = "cuda"

    def __init__(self) -> None:
        cupy = require()
        self._runtime = cupy.cuda.runtime
        self._number = self._runtime.getDevice()
        self._device = cupy.cuda.Device(self._number)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._event = cupy.cuda.Event
        self._blocks: list[int] = []
        self.stream = int(self._stream.ptr)

    def use(self) -> None:
        """Make the GPU current in the calling thread."""
        self._device.use()

    def operations(self, deterministic: bool) -> Any:
        """Return the kernels' operations, enqueued on this device's stream; ``deterministic``: those of fixed.py."""
        from infer.gpu.fixed import FixedOperations
        from infer.gpu.kernels import Kernels
        from infer.gpu.operations import Operations

        size = WORKSPACE_BYTES + UNPACKED_BYTES
        workspace = self.allocate(size)
        self.clear(workspace, size)
        kind = FixedOperations if deterministic else Operations
        return kind(Kernels(), self.stream, workspace, size)

    def allocate(self, size: int) -> int:
        """Return a pointer to ``size`` bytes, aligned to 256."""
        try:
            pointer = int(self._runtime.malloc(max(size, 256)))
        except self._runtime.CUDARuntimeError as error:
            free = self.free_bytes()
            advice = "free memory, or use a smaller model, cache or max_num_batched_tokens"
            raise InferError(f"the GPU cannot give {size} bytes, it has {free} free; {advice} ({error})") from error
        self._blocks.append(pointer)
        return pointer

    def give_back(self, pointer: int) -> None:
        """Give back what `allocate` gave, once nothing enqueued uses it."""
        self._blocks.remove(pointer)
        self._runtime.free(pointer)

    def joules(self) -> Callable[[], float] | None:
        """Return what tells the energy taken so far; None where nobody counts."""
        from infer.gpu.energy import counter

        return counter(self._runtime.deviceGetPCIBusId(self._number))

    def free_bytes(self) -> int:
        """Return how many bytes nobody has taken."""
        return int(self._runtime.memGetInfo()[0])

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Return an array in host memory that the GPU copies from and to by itself."""
        import cupyx

        array: NDArray[Any] = cupyx.empty_pinned(shape, dtype)
        return array

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a contiguous array to the device."""
        if array.nbytes <= BRIEF_BYTES:
            place, source, stream = (ctypes.c_void_p(each) for each in (pointer, array.ctypes.data, self.stream))
            check(driver().cuMemcpyHtoDAsync_v2(place, source, ctypes.c_size_t(array.nbytes), stream), "a copy to the GPU")
            return
        self._runtime.memcpyAsync(pointer, array.ctypes.data, array.nbytes, HOST_TO_DEVICE, self.stream)

    def upload_columns(self, pointer: int, array: NDArray[Any], rows: int, columns: int) -> None:
        """Enqueue a copy of the first rows and columns of a contiguous array to an array of the same shape."""
        pitch, width = array.strides[0], columns * array.itemsize
        self._runtime.memcpy2DAsync(pointer, pitch, array.ctypes.data, pitch, width, rows, HOST_TO_DEVICE, self.stream)

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """Enqueue a copy from the device to a contiguous array."""
        if array.nbytes <= BRIEF_BYTES:
            place, source, stream = (ctypes.c_void_p(each) for each in (array.ctypes.data, pointer, self.stream))
            check(driver().cuMemcpyDtoHAsync_v2(place, source, ctypes.c_size_t(array.nbytes), stream), "a copy from the GPU")
            return
        self._runtime.memcpyAsync(array.ctypes.data, pointer, array.nbytes, DEVICE_TO_HOST, self.stream)

    def clear(self, pointer: int, size: int) -> None:
        """Enqueue zeros."""
        self._runtime.memsetAsync(pointer, 0, size, self.stream)

    def event(self) -> Any:
        """Return what can mark a place in what is enqueued; the driver knows it by its ``ptr``."""
        return self._event(disable_timing=True)

    def functions(self) -> dict[str, int]:
        """Return where the driver's functions are that the core calls by itself."""
        return {name: ctypes.cast(getattr(driver(), name), ctypes.c_void_p).value or 0 for name in FUNCTIONS}

    def mark(self) -> Any:
        """Return what `reach` waits for: all that is enqueued up to here."""
        event = self.event()
        check(driver().cuEventRecord(ctypes.c_void_p(event.ptr), ctypes.c_void_p(self.stream)), "marking a step's end")
        return event

    def reach(self, mark: Any) -> None:
        """Wait until everything before a mark is done; other Python threads go on meanwhile."""
        mark.synchronize()

    def synchronize(self) -> None:
        """Wait until everything enqueued is done; other Python threads go on meanwhile."""
        self._stream.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what ``enqueue`` enqueues, without doing it; return what enqueues all of it at once."""
        self._stream.begin_capture()
        try:
            enqueue()
        finally:
            graph = self._stream.end_capture()
        graph.upload(self._stream)
        return Graph(graph, self.stream)

    def is_broken(self, error: BaseException) -> bool:
        """Whether the GPU can do nothing more in this process after this error."""
        return isinstance(error, self._runtime.CUDARuntimeError)

    def close(self) -> None:
        """Give the memory back. Harmless when repeated."""
        import contextlib

        blocks, self._blocks = self._blocks, []
        with contextlib.suppress(self._runtime.CUDARuntimeError):  # a broken GPU took its memory with it
            self._stream.synchronize()
            for pointer in blocks:
                self._runtime.free(pointer)


class Graph:
    """What was captured: called, it is enqueued all at once; the driver knows it by its ``ptr``."""

    def __init__(self, graph: Any, stream: int) -> None:
        self._graph = graph  # which lives as long
        self.ptr = int(graph.graphExec)
        self._launch, self._arguments = driver().cuGraphLaunch, (ctypes.c_void_p(self.ptr), ctypes.c_void_p(stream))

    def __call__(self) -> None:
        """Enqueue it."""
        check(self._launch(*self._arguments), "launching a graph")


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous array, without a copy."""
    import numpy as np

    return array.reshape(-1).view(np.uint8)
