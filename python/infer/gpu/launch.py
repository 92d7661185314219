"""Launching kernels through the driver, with what CuPy's launcher lacks: programmatic dependent launch.

A kernel launched so may start while its predecessor ends; it waits by itself (``griddepcontrol.wait``) before it reads what
that wrote. Works while a stream captures: the edge between the two graph nodes is then a programmatic one. Arguments are packed
into memory that each kernel keeps; the driver copies them during the call, so one thread at a time may launch a kernel.
"""

from __future__ import annotations

import ctypes
import re
import struct
from functools import cached_property, lru_cache

from infer._core import InferError

DEPENDENT = 90
"""Compute capability from which a kernel may start while the one before it ends."""

PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
REGISTERS = 4  # CU_FUNC_ATTRIBUTE_NUM_REGS
SHARED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
SIGNATURE = re.compile(r"^(?:KERNEL|BOUNDED_KERNEL\([^\n]*\))\s+(\w+)\(([^)]*)\)", re.MULTILINE)
CODES = {"int": "i", "float": "f", "u32": "I", "u64": "Q", "TensorMap": "T"}
MAP_BYTES = 128


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """Return the CUDA driver's library."""
    try:
        # PyDLL keeps the GIL: no call waits, and if each of a step's launches gave it up, busy threads would come in between.
        return ctypes.PyDLL("libcuda.so.1")
    except OSError as error:
        raise InferError(f"the NVIDIA driver's library cannot be loaded: {error}") from error


def check(status: int, what: str) -> None:
    """Raise what a driver call reports."""
    if status != 0:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(name))
        raise InferError(f"{what} failed: {(name.value or b'unknown error').decode()} ({status})")


def signatures(source: str) -> dict[str, str]:
    """Return the kernels of a source with the types of their parameters: P pointer, i int, f float, I u32, Q u64, T map."""
    return {match[1]: "".join(map(_code, match[2].split(","))) for match in SIGNATURE.finditer(source)}


def _code(parameter: str) -> str:
    return "P" if "*" in parameter else CODES[parameter.split()[-2]]


class Kernel:
    """A function of a loaded module."""

    def __init__(self, function: int, name: str, codes: str, dependent: bool, carveout: int = 100) -> None:
        self.name = name
        self._function = ctypes.c_void_p(function)
        self._launch = driver().cuLaunchKernelEx
        self._packer, offsets = _layout(codes)
        self._buffer = ctypes.create_string_buffer(max(self._packer.size, 1))
        base = ctypes.addressof(self._buffer)
        self._pointers = (ctypes.c_void_p * max(len(offsets), 1))(*(base + offset for offset in offsets))
        self._attributes = (_Attribute * 2)(_Attribute(PROGRAMMATIC_SERIALIZATION), _Attribute(CLUSTER_DIMENSION))
        self._attributes[0].value[0] = 1
        self._dependent = int(dependent)
        self._config = _Config(attributes=self._attributes)
        self._config_pointer = ctypes.byref(self._config)
        self._shared_limit = 0
        if dependent:
            # While a multiprocessor's memory is divided anew, it runs nothing. So nearly all kernels divide it alike.
            check(driver().cuFuncSetAttribute(self._function, SHARED_CARVEOUT, carveout), f"shared memory of {name}")

    def __call__(
        self,
        stream: int,
        grid: tuple[int, ...],
        threads: int,
        arguments: tuple[int | float | bytes, ...],
        shared: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """Enqueue one launch: ``grid`` blocks of ``threads`` threads with ``shared`` bytes of dynamic shared memory.

        ``cluster`` neighbouring blocks run together; more than 1 needs compute capability 9.0. ``cooperative``: all blocks run
        at once, so they may wait for each other, and none starts before the kernel before this one has ended.
        """
        self._packer.pack_into(self._buffer, 0, *arguments)
        config = self._config
        config.grid_x, config.grid_y, config.grid_z = (*grid, 1, 1)[:3]
        config.block_x, config.block_y, config.block_z = threads, 1, 1
        config.shared, config.stream = shared, stream
        self._attributes[0].id = COOPERATIVE if cooperative else PROGRAMMATIC_SERIALIZATION
        config.attribute_count = (cooperative or self._dependent) + (cluster > 1)
        if cluster > 1:
            self._attributes[1].value[:3] = (cluster, 1, 1)
        if shared > self._shared_limit:
            check(driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared), f"shared memory of {self.name}")
            self._shared_limit = shared
        status = self._launch(self._config_pointer, self._function, self._pointers, None)
        if status:
            check(status, f"launch of {self.name} with grid {grid}, {threads} threads")

    @cached_property
    def registers(self) -> int:
        """Registers of each thread."""
        count = ctypes.c_int()
        check(driver().cuFuncGetAttribute(ctypes.byref(count), REGISTERS, self._function), f"registers of {self.name}")
        return count.value

    def most_clusters(self, cluster: int, threads: int, shared: int) -> int:
        """Return how many clusters of so many blocks run at once; 0 where there are none of that size."""
        attributes = (_Attribute * 1)(_Attribute(CLUSTER_DIMENSION))
        attributes[0].value[:3] = (cluster, 1, 1)
        shape = (cluster, 1, 1, threads, 1, 1, shared)
        config, count = _Config(*shape, None, attributes, attribute_count=1), ctypes.c_int()
        check(driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared), f"shared memory of {self.name}")
        self._shared_limit = max(self._shared_limit, shared)
        status = driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self._function, ctypes.byref(config))
        return count.value if status == 0 else 0


def _layout(codes: str) -> tuple[struct.Struct, list[int]]:
    """Return how arguments are packed, each at a multiple of its size, and where each begins."""
    form, offsets, end = "=", [], 0
    for code in codes:
        size = MAP_BYTES if code == "T" else 8 if code in "PQ" else 4
        padding = -end % size
        form += "x" * padding + {"P": "Q", "T": f"{MAP_BYTES}s"}.get(code, code)
        offsets.append(end + padding)
        end += padding + size
    return struct.Struct(form), offsets
