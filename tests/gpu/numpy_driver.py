"""The CUDA driver's functions that the core calls by itself, over this process's memory: what is enqueued is done at once.

They are ctypes callbacks with the signatures of `cuda.h`, so the core calls them as it calls the driver's.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURE = 700


class Side(ctypes.Structure):
    """One side of a copy of columns."""

    _fields_ = [
        ("first_byte", c_size_t),
        ("first_row", c_size_t),
        ("kind", c_uint),
        ("host", c_size_t),
        ("device", c_uint64),
        ("array", c_size_t),
        ("pitch", c_size_t),
    ]


class Columns(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [("source", Side), ("target", Side), ("width", c_size_t), ("height", c_size_t)]


class HostGraph:
    """What a capture gives: it is known to the driver by its number."""

    def __init__(self, ptr: int, enqueue: Callable[[], None]) -> None:
        self.ptr, self._enqueue = ptr, enqueue

    def __call__(self) -> None:
        self._enqueue()


class HostEvent:
    """What marks a place, where everything is done at once."""

    ptr = 1


class HostDriver:
    """The functions.

    Parameters
    ----------
    synchronize
        Called where the driver waits; raises where it fails.

    Attributes
    ----------
    calls
        Names of the functions in the order in which they were called, but for copies.
    fail_launches
        How many launches to let fail from now on.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._graphs: dict[int, HostGraph] = {}
        self._error = b""
        self.calls: list[str] = []
        self.fail_launches = 0
        handle = c_size_t
        self._functions = {
            "cuMemcpyHtoDAsync_v2": self._callback(self._copy, c_uint64, c_void_p, c_size_t, handle),
            "cuMemcpyDtoHAsync_v2": self._callback(self._copy, c_void_p, c_uint64, c_size_t, handle),
            "cuMemcpy2DAsync_v2": self._callback(self._copy_columns, ctypes.POINTER(Columns), handle),
            "cuGraphLaunch": self._callback(self._launch, handle, handle),
            "cuEventRecord": self._callback(self._record, handle, handle),
            "cuEventSynchronize": self._callback(self._wait, handle),
            "cuGetErrorName": self._callback(self._name, c_int, ctypes.POINTER(c_char_p)),
        }

    def addresses(self) -> dict[str, int]:
        """Where the functions are."""
        return {name: ctypes.cast(function, c_void_p).value or 0 for name, function in self._functions.items()}

    def graph(self, enqueue: Callable[[], None]) -> HostGraph:
        """Make a graph that can be launched."""
        graph = HostGraph(len(self._graphs) + 1, enqueue)
        self._graphs[graph.ptr] = graph
        return graph

    def _callback(self, function: Callable[..., None], *types: Any) -> Any:
        def call(*arguments: Any) -> int:
            try:
                function(*arguments)
            except Exception as error:
                self._error = str(error).encode()
                return FAILURE
            return 0

        return ctypes.CFUNCTYPE(c_int, *types)(call)

    def _copy(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    def _copy_columns(self, pointer: Any, stream: int) -> None:
        columns = pointer.contents
        assert (columns.source.kind, columns.target.kind) == (1, 2)
        self.calls.append("columns")
        for row in range(columns.height):
            source, target = columns.source, columns.target
            ctypes.memmove(target.device + row * target.pitch, source.host + row * source.pitch, columns.width)

    def _launch(self, graph: int, stream: int) -> None:
        if self.fail_launches:
            self.fail_launches -= 1
            raise RuntimeError("a launch that failed")
        self.calls.append("launch")
        self._graphs[graph]()

    def _record(self, event: int, stream: int) -> None:
        self.calls.append("record")

    def _wait(self, event: int) -> None:
        self.calls.append("wait")
        self._synchronize()

    def _name(self, status: int, out: Any) -> None:
        assert status == FAILURE
        out[0] = self._error
