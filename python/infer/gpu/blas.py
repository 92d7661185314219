"""Matrix products by cuBLASLt, through ctypes: CuPy's own bindings refuse while a stream captures, and know no float8.

One algorithm is chosen per shape, the first time it is seen; workspace is fixed memory that the caller owns. Nothing is
allocated afterwards, so captured graphs stay valid.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from infer._core import InferError
from infer.gpu.arrays import ELEMENT_BYTES

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows, Weight

# From cublasLt.h and library_types.h.
COMPUTE_32F = 68
CUDA_TYPES = {"f32": 0, "f16": 2, "bf16": 14, "e4m3": 28}
TRANSPOSE_FIRST = 3  # CUBLASLT_MATMUL_DESC_TRANSA
TRANSPOSED = 1  # CUBLAS_OP_T
SCALE_POINTERS = (17, 18)  # CUBLASLT_MATMUL_DESC_A_SCALE_POINTER and B
SCALE_MODES = (31, 32)  # CUBLASLT_MATMUL_DESC_A_SCALE_MODE and B
OUTER_SCALES = 3  # CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F: one for each row of either operand
FAST_SUMS = 25  # CUBLASLT_MATMUL_DESC_FAST_ACCUM
PREFERENCE_WORKSPACE = 1
PREFERENCE_ALIGNMENTS = (5, 6, 7, 8)  # of A, B, C and D
MOST_ALIGNMENT = 256


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class _Shape(NamedTuple):
    """What an algorithm is chosen for; strides and sizes count elements."""

    rows: int
    outputs: int
    columns: int
    weight_type: str
    input_type: str
    output_type: str
    input_stride: int
    output_stride: int
    alignments: tuple[int, int, int]


class _Plan(NamedTuple):
    description: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    heuristic: _Heuristic


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return cuBLASLt of the installed CUDA; its calls keep the GIL, as the driver's (launch.py)."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.PyDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError, OSError, TypeError):
        pass
    for name in ("libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            return ctypes.PyDLL(name)
        except OSError:
            continue
    raise InferError("cuBLASLt was not found: install the CUDA libraries, for example with `pip install 'cupy-cuda13x[ctk]'`")


def check(status: int, what: str) -> None:
    """Raise what a call of cuBLASLt reports."""
    if status != 0:
        raise InferError(f"{what} failed in cuBLASLt with status {status}")


class Blas:
    """Matrix products on one device, with ``workspace_bytes`` of device memory at ``workspace`` to work in."""

    def __init__(self, workspace: int, workspace_bytes: int) -> None:
        self._library = library()
        self._workspace = ctypes.c_void_p(workspace)
        self._workspace_bytes = ctypes.c_size_t(workspace_bytes)
        self._handle = ctypes.c_void_p()
        self._plans: dict[_Shape, _Plan] = {}
        check(self._library.cublasLtCreate(ctypes.byref(self._handle)), "creating a handle")

    def has_scaled(self, source: Rows, weight: Weight, output: Rows) -> bool:
        """Return whether this cuBLASLt and GPU multiply these E4M3 rows with one scale each."""
        try:
            self._plan(source, weight, output)
        except InferError:
            return False
        return True

    def product(
        self,
        stream: int,
        source: Rows,
        weight: Weight,
        output: Rows,
        alpha: float = 1.0,
        beta: float = 0.0,
        source_scales: int = 0,
    ) -> None:
        """``output = alpha * source * weight^T + beta * output``; the bias is not added.

        Where both are E4M3, each row of either has its scale: the weight's own, and ``source_scales``, f32 (rows).
        """
        plan = self._plan(source, weight, output)
        if source.dtype == "e4m3":
            for attribute, pointer in zip(SCALE_POINTERS, (weight.scales, source_scales), strict=True):
                self._set(plan.description, attribute, ctypes.c_void_p(pointer))
        one, two = ctypes.c_float(alpha), ctypes.c_float(beta)
        target, (first, second, result) = ctypes.c_void_p(output.pointer), plan.layouts
        status = self._library.cublasLtMatmul(
            self._handle,
            plan.description,
            ctypes.byref(one),
            ctypes.c_void_p(weight.pointer),
            first,
            ctypes.c_void_p(source.pointer),
            second,
            ctypes.byref(two),
            target,
            result,
            target,
            result,
            ctypes.byref(plan.heuristic.algorithm),
            self._workspace,
            self._workspace_bytes,
            ctypes.c_void_p(stream),
        )
        check(status, f"a product of {source.rows} x {weight.columns} with {weight.rows} rows")

    def _plan(self, source: Rows, weight: Weight, output: Rows) -> _Plan:
        pointers = (weight.pointer, source.pointer, output.pointer)
        alignments = tuple(min(MOST_ALIGNMENT, pointer & -pointer) for pointer in pointers)
        strides = (source.stride, output.stride)
        types = (weight.type, source.dtype, output.dtype)
        shape = _Shape(source.rows, weight.rows, weight.columns, *types, *strides, alignments)  # type: ignore[arg-type]
        if (found := self._plans.get(shape)) is None:
            found = self._plans[shape] = self._make(shape, weight.scales)
        return found

    def _make(self, shape: _Shape, scales: int) -> _Plan:
        """Describe the product in cuBLAS's order, by columns: (weight^T)^T times input^T gives output^T."""
        lib, description = self._library, ctypes.c_void_p()
        check(lib.cublasLtMatmulDescCreate(ctypes.byref(description), COMPUTE_32F, CUDA_TYPES["f32"]), "describing a product")
        self._set(description, TRANSPOSE_FIRST, ctypes.c_int(TRANSPOSED))
        if shape.input_type == "e4m3":
            for mode, pointer in zip(SCALE_MODES, SCALE_POINTERS, strict=True):
                self._set(description, mode, ctypes.c_int(OUTER_SCALES))
                self._set(description, pointer, ctypes.c_void_p(scales))  # without any, no algorithm is found
            self._set(description, FAST_SUMS, ctypes.c_int8(1))
        first = self._layout(shape.weight_type, shape.columns, shape.outputs, shape.columns)
        second = self._layout(shape.input_type, shape.columns, shape.rows, shape.input_stride)
        result = self._layout(shape.output_type, shape.outputs, shape.rows, shape.output_stride)
        preference = self._preference(shape.alignments)
        heuristic, count = _Heuristic(), ctypes.c_int()
        status = lib.cublasLtMatmulAlgoGetHeuristic(
            self._handle, description, first, second, result, result, preference, 1, ctypes.byref(heuristic), ctypes.byref(count)
        )
        lib.cublasLtMatmulPreferenceDestroy(preference)
        if status != 0 or count.value == 0:
            raise InferError(f"cuBLASLt has no algorithm for {shape}")
        return _Plan(description, (first, second, result), heuristic)

    def _set(self, description: ctypes.c_void_p, attribute: int, value: ctypes.c_int | ctypes.c_int8 | ctypes.c_void_p) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        status = self._library.cublasLtMatmulDescSetAttribute(description, attribute, ctypes.byref(value), size)
        check(status, "describing a product")

    def _layout(self, element: str, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
        check(self._library.cublasLtMatrixLayoutCreate(ctypes.byref(layout), CUDA_TYPES[element], *sizes), "describing a matrix")
        return layout

    def _preference(self, alignments: tuple[int, int, int]) -> ctypes.c_void_p:
        preference = ctypes.c_void_p()
        check(self._library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "describing a preference")
        set_attribute = self._library.cublasLtMatmulPreferenceSetAttribute
        size = ctypes.byref(self._workspace_bytes)
        check(set_attribute(preference, PREFERENCE_WORKSPACE, size, ctypes.c_size_t(8)), "describing a preference")
        for attribute, alignment in zip(PREFERENCE_ALIGNMENTS, (*alignments, alignments[2]), strict=True):
            value = ctypes.c_uint32(alignment)
            check(set_attribute(preference, attribute, ctypes.byref(value), ctypes.c_size_t(4)), "describing a preference")
        return preference


def can_multiply(source: Rows, weight: Weight, output: Rows) -> bool:
    """Return whether cuBLASLt takes these types and alignments."""
    types = (weight.type, source.dtype, output.dtype)
    if types not in (("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32"), ("f32", "f32", "f32")):
        return False
    sizes = ((weight.columns, weight.type), (source.stride, source.dtype), (output.stride, output.dtype))
    pointers = (weight.pointer, source.pointer, output.pointer)
    return all(n * ELEMENT_BYTES[t] % 16 == 0 for n, t in sizes) and all(pointer % 16 == 0 for pointer in pointers)
