"""Matrix products by cuBLASLt, through ctypes: CuPy's own bindings refuse while a stream captures, and know no float8.

One algorithm is chosen per shape, the first time it is seen (tuning.py); workspace is fixed memory that the caller owns. Nothing
is allocated afterwards, so captured graphs stay valid.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from infer._core import InferError
from infer.gpu.arrays import ELEMENT_BYTES
from infer.gpu.tuning import Choices, fastest, may_time

if TYPE_CHECKING:
    from collections.abc import Callable

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

TIMED_ROWS = 17, 512
"""Least and most rows of products whose algorithm is timed: fewer are streamed, and of more the first choice is a good one.

Prompts of 8,192 rows keep an H100 at its 700 W. There, tiles of 256 x 128 were 4 % faster than the first choice for gate and
up, queries, keys and values of 8B in bfloat16, and 6 % for `down` in E4M3, product by product; whole prompts took as long.
"""
CANDIDATES = 8
LEAST_TIMED = 40 << 20
"""Bytes of weights of such products: shorter ones are over before the clock can tell them apart."""


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


_Layouts = tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


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
    layouts: _Layouts
    heuristic: _Heuristic
    is_first_choice: bool
    """Others may be faster, and are to be timed."""


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
    """Matrix products on one device, with ``workspace_bytes`` of device memory at ``workspace`` to work in.

    ``space`` is memory that is used while algorithms are timed: (address, bytes); none are where it is None.
    """

    def __init__(self, workspace: int, workspace_bytes: int, space: tuple[int, int] | None) -> None:
        self._library = library()
        self._workspace = ctypes.c_void_p(workspace)
        self._workspace_bytes = ctypes.c_size_t(workspace_bytes)
        self._handle = ctypes.c_void_p()
        self._plans: dict[_Shape, _Plan] = {}
        check(self._library.cublasLtCreate(ctypes.byref(self._handle)), "creating a handle")
        self._space, self._choices = space, None if space is None else Choices(self._version(), workspace_bytes)

    def _version(self) -> int:
        get = self._library.cublasLtGetVersion
        get.restype = ctypes.c_size_t
        return int(get())

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
        if plan.is_first_choice and self._choices is not None and may_time(stream):
            plan = self._time(stream, plan, source, weight, output, source_scales)
        self._enqueue(stream, plan, source, weight, output, alpha, beta, source_scales)

    def _enqueue(
        self,
        stream: int,
        plan: _Plan,
        source: Rows,
        weight: Weight,
        output: Rows,
        alpha: float,
        beta: float,
        source_scales: int,
    ) -> None:
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

    def _time(self, stream: int, plan: _Plan, source: Rows, weight: Weight, output: Rows, scales: int) -> _Plan:
        """Choose the fastest algorithm for a shape, and keep it.

        What the space holds is lost; if that is an operand, nothing is timed.
        """
        shape, choices = _shape(source, weight, output), self._choices
        start, size = self._space or (0, 0)
        target_bytes = source.rows * output.stride * ELEMENT_BYTES[output.dtype]
        plans = self._plans_of(shape, weight.scales)
        weight_bytes = weight.rows * weight.row_bytes
        is_operand = any(start <= pointer < start + size for pointer in (source.pointer, weight.pointer))
        found = plan._replace(is_first_choice=False)
        if choices and len(plans) > 1 and not is_operand and target_bytes < size:
            target = output._replace(pointer=start)
            place = -(-target_bytes // MOST_ALIGNMENT) * MOST_ALIGNMENT

            def product(one: _Plan) -> Callable[[int], None]:
                return lambda pointer: self._enqueue(
                    stream, one, source, replace(weight, pointer=pointer), target, 1.0, 0.0, scales
                )

            number = fastest(stream, [product(one) for one in plans], weight.pointer, weight_bytes, start + place, size - place)
            found = plans[number]._replace(is_first_choice=False)
            choices.put(str(tuple(shape)), list(found.heuristic.algorithm))
        self._plans[shape] = found
        return found

    def _plan(self, source: Rows, weight: Weight, output: Rows) -> _Plan:
        shape = _shape(source, weight, output)
        if (found := self._plans.get(shape)) is None:
            found = self._plans[shape] = self._kept(shape, weight.scales) or self._plans_of(shape, weight.scales)[0]
        return found

    def _kept(self, shape: _Shape, scales: int) -> _Plan | None:
        """Return a product by the algorithm that was chosen in an earlier process, if there is one that can be used."""
        words = self._choices.get(str(tuple(shape))) if self._choices else None
        if words is None:
            return None
        description, (first, second, result) = self._describe(shape, scales)
        heuristic = _Heuristic((ctypes.c_uint64 * 8)(*words))
        checked = _Heuristic()
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle, description, first, second, result, result, ctypes.byref(heuristic), ctypes.byref(checked)
        )
        if status != 0 or checked.workspace > self._workspace_bytes.value:
            return None
        return _Plan(description, (first, second, result), heuristic, is_first_choice=False)

    def _plans_of(self, shape: _Shape, scales: int) -> list[_Plan]:
        """Return a product's algorithms, what cuBLASLt thinks the fastest first: several only where they are to be timed."""
        description, layouts = self._describe(shape, scales)
        least, most = TIMED_ROWS
        weight_bytes = shape.outputs * shape.columns * ELEMENT_BYTES[shape.weight_type]
        timed = self._choices is not None and least <= shape.rows <= most and weight_bytes >= LEAST_TIMED
        preference = self._preference(shape.alignments)
        found, count = (_Heuristic * CANDIDATES)(), ctypes.c_int()
        first, second, result = layouts
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle,
            description,
            first,
            second,
            result,
            result,
            preference,
            CANDIDATES if timed else 1,
            found,
            ctypes.byref(count),
        )
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        if status != 0 or count.value == 0:
            raise InferError(f"cuBLASLt has no algorithm for {shape}")
        return [_Plan(description, layouts, found[i], timed) for i in range(count.value) if found[i].state == 0]

    def _describe(self, shape: _Shape, scales: int) -> tuple[ctypes.c_void_p, _Layouts]:
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
        return description, (first, second, self._layout(shape.output_type, shape.outputs, shape.rows, shape.output_stride))

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


def _shape(source: Rows, weight: Weight, output: Rows) -> _Shape:
    alignments = [min(MOST_ALIGNMENT, pointer & -pointer) for pointer in (weight.pointer, source.pointer, output.pointer)]
    sizes = (source.rows, weight.rows, weight.columns)
    types = (weight.type, source.dtype, output.dtype)
    return _Shape(*sizes, *types, source.stride, output.stride, (alignments[0], alignments[1], alignments[2]))


def can_multiply(source: Rows, weight: Weight, output: Rows) -> bool:
    """Return whether cuBLASLt takes these types and alignments."""
    types = (weight.type, source.dtype, output.dtype)
    if types not in (("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32"), ("f32", "f32", "f32")):
        return False
    sizes = ((weight.columns, weight.type), (source.stride, source.dtype), (output.stride, output.dtype))
    pointers = (weight.pointer, source.pointer, output.pointer)
    return all(n * ELEMENT_BYTES[t] % 16 == 0 for n, t in sizes) and all(pointer % 16 == 0 for pointer in pointers)
