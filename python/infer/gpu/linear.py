"""Products of rows with weight matrices: which kernel runs, and how it is launched.

Few rows stream the weights through one kernel (cuda/linear_stream.cu), with what surrounds the product fused in, and more through
others (linear_many.cu, linear_warp_group.cu, linear_wide.cu); beyond, cuBLASLt multiplies; what none takes, for its type, shape
or alignment, the plain kernel (cuda/linear.cu).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import (
    ACTIVATIONS,
    BLOCK_ROWS,
    ELEMENT_BYTES,
    PAGE_TOKENS,
    KvLayer,
    RopeTable,
    Rows,
    StepInputs,
    Weight,
    c_type,
)
from infer.gpu.attention import kv_macros
from infer.gpu.blas import Blas, can_multiply
from infer.gpu.launch import DEPENDENT
from infer.gpu.many import ADD, GATED, STORE, ceil_of
from infer.gpu.rows import STREAM_ROWS, THREADS, element_macros, norm_threads, vector
from infer.gpu.stream import (
    PREPARED_BYTES,
    STREAM_WARPS,
    half_threads,
    prepared_bytes,
    stream_rooms,
    stream_shape,
    stream_tokens,
)
from infer.gpu.warp_group import MOST_GATED
from infer.gpu.wide import WideOperations

if TYPE_CHECKING:
    from infer.gpu.attention import AttentionPlan
    from infer.gpu.kernels import Kernels
    from infer.gpu.launch import Kernel

MOST_MANY = {"e4m3": 128, "int4": 384, "int8": 256}
"""Most rows that linear_many.cu multiplies, as many at a time as fit, by the weight's type: beyond, cuBLASLt is faster.

With bfloat16 weights it is from the first.
"""

MOST_SCALED = 64, 32
"""Most rows, and weight rows for each multiprocessor, for which linear_many.cu multiplies E4M3 weights though cuBLASLt
could, with rows rounded to E4M3, and linear_warp_group.cu cannot: cuBLASLt does not split columns then, and leaves
multiprocessors idle."""

BLAS_BYTES = 32 << 20
UNPACKED_ROWS = 64
"""Weight rows that are unpacked at a time are a multiple of this."""
MOST_GRID_ROWS = 65535

WARPS = 8  # of the plain kernel
PREPARED_COLUMNS = 256  # of a warp


class StreamLaunch(NamedTuple):
    """How a streaming product runs."""

    macros: dict[str, int | str]
    blocks: int
    threads: int
    """0 for as many as take more than half of a multiprocessor's registers."""
    shared: int
    is_resident: bool
    """Whether all of the input is kept in shared memory."""


class LinearOperations(WideOperations):
    """Matrix products, enqueued on one stream. ``workspace`` is device memory that no one else uses on this stream.

    cuBLASLt has the first BLAS_BYTES of it; in the rest, weights are unpacked for many rows, as many at a time as fit, or
    rows are rounded, or arranged.
    """

    is_timed = True
    """Whether cuBLASLt's algorithms are timed, and the fastest chosen."""

    def __init__(self, kernels: Kernels, stream: int, workspace: int, workspace_bytes: int) -> None:
        blas_bytes = min(workspace_bytes, BLAS_BYTES)
        super().__init__(kernels, stream, workspace + blas_bytes, workspace_bytes - blas_bytes)
        self._blas = Blas(workspace, blas_bytes, (self._space, self._space_bytes) if self.is_timed else None)

    def linear(self, source: Rows, output: Rows, weight: Weight) -> None:
        """``output = source * weight^T + bias``."""
        if source.rows == 0:
            return
        if self._can_stream(source, output, weight):
            self._stream(source, output, weight, STORE)
        elif self._is_many(source, output, weight):
            self._many(source, output, weight, STORE)
        elif self._is_grouped(source, output, weight):
            self._multiply_grouped(source, output, weight, STORE)
        elif can_multiply(source, weight, output):
            self._blas.product(self.stream, source, weight, output)
            if weight.bias:
                self._add_bias(output, weight.bias, 1.0)
        elif self._can_unpack(source, output, weight):
            self._wide_product(source, output, weight, 1.0, 0.0)
        else:
            self._linear_plainly(source, output, weight, 0.0)

    def linear_add(self, source: Rows, destination: Rows, weight: Weight, scale: float = 1.0) -> None:
        """``destination += scale * (source * weight^T + bias)``."""
        if source.rows == 0:
            return
        if self._can_stream(source, destination, weight):
            self._stream(source, destination, weight, ADD, add=scale)
        elif self._is_many(source, destination, weight):
            self._many(source, destination, weight, ADD, add=scale)
        elif self._is_grouped(source, destination, weight):
            self._multiply_grouped(source, destination, weight, ADD, scale)
        elif can_multiply(source, weight, destination):
            self._blas.product(self.stream, source, weight, destination, alpha=scale, beta=1.0)
            if weight.bias:
                self._add_bias(destination, weight.bias, scale)
        elif self._can_unpack(source, destination, weight):
            self._wide_product(source, destination, weight, scale, 1.0)
        else:
            self._linear_plainly(source, destination, weight, scale)

    def linear_gated(self, source: Rows, output: Rows, weight: Weight, activation: str, scratch: Rows) -> None:
        """``output = activation(gate) * up``, where the weight's rows are the gate's and then up's.

        ``scratch`` is (rows, 2 * width), used where the two steps are not fused.
        """
        width = weight.rows // 2
        if can_pair(weight) and self._can_stream(source, output, weight):
            self._stream(source, output, weight, GATED, activation=activation)
            return
        both = scratch.part(0, weight.rows)  # as wide as the product that would be made otherwise
        if can_pair(weight) and self._can_be_many(source, output, weight) and self._is_many(source, both, weight):
            self._many(source, output, weight, GATED, activation=activation)
            return
        if can_pair(weight) and self._is_grouped(source, output, weight, MOST_GATED):
            self._multiply_grouped(source, output, weight, GATED, activation=activation)
            return
        self.linear(source, both, weight)
        self.gated_activation(scratch.part(0, width), scratch.part(width, width), output, activation)

    def norm_linear(self, source: Rows, output: Rows, weight: Weight, norm: int, epsilon: float, scratch: Rows) -> None:
        """``output = rms_norm(source) * weight^T + bias``; ``norm`` is the norm's weight, ``scratch`` as wide as the source."""
        if self._can_stream(source, output, weight) and self._can_normalise(source, weight, STORE):
            self._stream(source, output, weight, STORE, norm=norm, epsilon=epsilon)
            return
        self.norm(source, scratch, "rms", epsilon, norm)
        self.linear(scratch, output, weight)

    def norm_linear_gated(
        self,
        source: Rows,
        output: Rows,
        weight: Weight,
        activation: str,
        norm: int,
        epsilon: float,
        normed: Rows,
        scratch: Rows,
    ) -> None:
        """``linear_gated`` of ``rms_norm(source)``; ``normed`` is working memory as wide as the source."""
        if self._can_stream(source, output, weight) and can_pair(weight) and self._can_normalise(source, weight, GATED):
            self._stream(source, output, weight, GATED, norm=norm, epsilon=epsilon, activation=activation)
            return
        self.norm(source, normed, "rms", epsilon, norm)
        self.linear_gated(normed, output, weight, activation, scratch)

    def qkv(
        self,
        inputs: StepInputs,
        source: Rows,
        qkv: Rows,
        weight: Weight,
        layer: KvLayer,
        heads: int,
        table: RopeTable,
        norm: int,
        epsilon: float,
        scratch: Rows,
        plan: AttentionPlan | None = None,
    ) -> None:
        """``rms_norm(source) * weight^T + bias``, queries and keys rotated, keys and values stored.

        ``norm`` 0 is none, else its weight (columns); ``scratch`` is as wide as the source. Of ``qkv``, (rows, (heads + 2 *
        kv_heads) * head_dim), only the queries are defined afterwards, or nothing with a ``plan`` (``rope_write_kv``).
        """
        if not (self._can_stream(source, qkv, weight) and can_rotate(layer, table)):
            if norm:
                self.norm_linear(source, qkv, weight, norm, epsilon, scratch)
            else:
                self.linear(source, qkv, weight)
            self.rope_write_kv(inputs, qkv, layer, heads, table, plan=plan)
            return
        if norm and not self._can_normalise(source, weight, GATED):
            self.norm(source, scratch, "rms", epsilon, norm)
            source, norm = scratch, 0
        launch = self._launch(source.rows, GATED, norm != 0, weight)
        kernel = self.kernels.get("linear_rope.cu", "linear_rope", **launch.macros, **kv_macros(layer))
        pointers = (
            self._streamed_rows(source, weight, launch),
            weight.pointer,
            weight.bias,
            weight.scales,
            weight.minima,
            norm,
            qkv.pointer,
        )
        places = (layer.keys, layer.values, table.pointer, inputs.rope_rows, inputs.slots)
        shape = (source.stride, qkv.stride, source.rows, weight.columns, heads, layer.kv_heads, layer.pages * PAGE_TOKENS)
        arguments = (*pointers, *places, *shape, epsilon)
        self._launch_stream(kernel, launch, arguments)

    def _stream(
        self,
        source: Rows,
        output: Rows,
        weight: Weight,
        epilogue: int,
        add: float = 1.0,
        norm: int = 0,
        epsilon: float = 0.0,
        activation: str = "silu",
    ) -> None:
        launch = self._launch(source.rows, epilogue, norm != 0, weight)
        macros: dict[str, int | str] = {
            "EPILOGUE": epilogue,
            "OUTPUT": c_type(output.dtype),
            "ACTIVATION": ACTIVATIONS.index(activation),
        }
        kernel = self.kernels.get("linear_stream.cu", "linear_stream", **launch.macros, **macros)
        rows = self._streamed_rows(source, weight, launch)
        pointers = (rows, weight.pointer, weight.bias, weight.scales, weight.minima, norm, output.pointer)
        shape = (source.stride, output.stride, source.rows, weight.rows, weight.columns)
        self._launch_stream(kernel, launch, (*pointers, *shape, add, epsilon))

    def _streamed_rows(self, source: Rows, weight: Weight, launch: StreamLaunch) -> int:
        """Return where a streaming product reads its rows: prepared, where it does not do that itself."""
        if weight.type not in PREPARED_BYTES or launch.is_resident:
            return source.pointer
        kernel = self.kernels.get("linear.cu", "prepare", VECTOR=8, **weight.macros, **element_macros(source.dtype))
        arguments = (source.pointer, self._space, source.stride, source.rows, weight.columns)
        kernel(self.stream, (ceil_of(weight.columns, PREPARED_COLUMNS * WARPS), source.rows), WARPS * 32, arguments)
        return self._space

    def _launch_stream(self, kernel: Kernel, launch: StreamLaunch, arguments: tuple[int | float, ...]) -> None:
        """Launch a streaming product."""
        kernel(self.stream, (launch.blocks,), launch.threads or half_threads(kernel.registers), arguments, launch.shared)
        self._streamed += 1

    def _is_many(self, source: Rows, output: Rows, weight: Weight) -> bool:
        """Return whether the kernel of many rows takes this product, and is faster than others."""
        if not (0 < source.rows <= MOST_MANY.get(weight.type, 0) and self._can_be_many(source, output, weight)):
            return False
        rows, weight_rows = MOST_SCALED
        few = source.rows <= rows and weight.rows <= weight_rows * self.kernels.multiprocessors
        few = few and not self._is_for_groups(source.rows, output, weight)
        return weight.type != "e4m3" or few or not self._can_scale(source, output, weight)

    def _can_stream(self, source: Rows, output: Rows, weight: Weight) -> bool:
        """Return whether the streaming kernel takes this product, and has room for its rows, if they are prepared."""
        return can_stream(source, output, weight) and prepared_bytes(source.rows, weight) <= self._space_bytes

    def _can_normalise(self, source: Rows, weight: Weight, epilogue: int) -> bool:
        """Return whether the streaming kernels normalise input rows themselves: every block does it anew, so few of them."""
        return source.rows <= 8 and self._launch(source.rows, epilogue, True, weight).is_resident

    def _launch(self, rows: int, epilogue: int, has_norm: bool, weight: Weight, more: int = 0) -> StreamLaunch:
        """Choose how a streaming product runs; with ``more`` bytes of shared memory, rows are resident."""
        blocks, limit = min(-(-weight.rows // 16), self.kernels.multiprocessors), self.kernels.shared_limit
        macros: dict[str, int | str] = {
            "TOKENS": stream_tokens(rows, weight),
            "PAIRED": int(epilogue == GATED),
            "NORM": int(has_norm),
        }
        macros |= {**weight.macros, "GROUPED": int(0 < weight.group < weight.columns and not weight.is_packed)}
        is_dependent = self.kernels.capability >= DEPENDENT
        takes_registers = is_dependent and self._streamed % 2 == 1
        rooms = tuple(room - more for room in stream_rooms(limit, is_dependent, takes_registers))
        shape = stream_shape(rows, weight, rooms, has_norm or more > 0)
        macros |= {"RESIDENT": int(shape.is_resident), "DEPTH": shape.depth}
        return StreamLaunch(macros, blocks, 0 if takes_registers else STREAM_WARPS * 32, shape.shared + more, shape.is_resident)

    def _linear_plainly(self, source: Rows, output: Rows, weight: Weight, add: float) -> None:
        v = vector(weight.columns, source) if weight.pointer % 16 == 0 else 1
        kernel = self.kernels.get(
            "linear.cu",
            "linear",
            VECTOR=v,
            OUTPUT=c_type(output.dtype),
            **weight.macros,
            **element_macros(source.dtype),
        )
        pointers = (source.pointer, weight.pointer, weight.bias, weight.scales, weight.minima, output.pointer)
        shape = (source.stride, output.stride, source.rows, weight.rows, weight.columns, weight.group or weight.columns)
        kernel(self.stream, (-(-weight.rows // WARPS), -(-source.rows // 4)), WARPS * 32, (*pointers, *shape, add))

    def round_rows(self, source: Rows, output: int, scales: int) -> None:
        """Round each row to E4M3 numbers, (rows, width), times its scale, f32 (rows): the largest of them becomes 448."""
        if source.dtype == "bf16" and self.round_held(source, output, scales):
            return
        v = vector(source.width, source)
        kernel = self.kernels.get("linear.cu", "quantize", VECTOR=v, WEIGHT=c_type("e4m3"), **element_macros(source.dtype))
        arguments = (source.pointer, output, scales, source.stride, source.width)
        kernel(self.stream, (source.rows,), norm_threads(source.width, v), arguments)

    def _can_unpack(self, source: Rows, output: Rows, weight: Weight) -> bool:
        fits = self._space_bytes >= UNPACKED_ROWS * weight.columns * ELEMENT_BYTES[source.dtype] and weight.columns % 8 == 0
        return (
            source.rows > STREAM_ROWS
            and (weight.type == "e4m3" or weight.is_packed)
            and fits
            and can_multiply(source, replace(weight, type=source.dtype), output)
        )

    def _rounded(self, source: Rows) -> Rows:
        """Return where rows are rounded to E4M3; their scales lie before them."""
        scales_bytes = ceil_of(source.rows * 4, 256) * 256
        return Rows(self._space + scales_bytes, source.rows, source.width, source.width, "e4m3")

    def _can_scale(self, source: Rows, output: Rows, weight: Weight) -> bool:
        """Return whether E4M3 weights are multiplied by rows rounded to E4M3, by warp groups or cuBLASLt."""
        rounded = self._rounded(source)
        fits = rounded.pointer + source.rows * source.width <= self._space + self._space_bytes
        known = weight.type == "e4m3" and source.dtype == "bf16" and weight.group in (0, weight.columns)
        whole = weight.columns % 16 == 0 and weight.rows % 16 == 0
        if not (fits and known and whole):
            return False
        return self._is_for_groups(source.rows, output, weight) or self._blas.has_scaled(rounded, weight, output)

    def _wide_product(self, source: Rows, output: Rows, weight: Weight, alpha: float, beta: float) -> None:
        """Multiply weights of few bits by many rows: E4M3 by E4M3 where the hardware does that, else unpacked."""
        if not self._can_scale(source, output, weight):
            self._unpacked_product(source, output, weight, alpha, beta)
            return
        rounded = self._rounded(source)
        self.round_rows(source, rounded.pointer, self._space)
        self._rounded_product(rounded, output, weight, alpha, beta)

    def _rounded_product(self, rounded: Rows, output: Rows, weight: Weight, alpha: float, beta: float) -> None:
        if self._is_for_groups(rounded.rows, output, weight):
            self._multiply_grouped(rounded, output, weight, ADD if beta else STORE, alpha, scales=self._space)
            return
        self._blas.product(self.stream, rounded, weight, output, alpha, beta, self._space)
        if weight.bias:
            self._add_bias(output, weight.bias, alpha)

    def _unpacked_product(self, source: Rows, output: Rows, weight: Weight, alpha: float, beta: float) -> None:
        macros = {**weight.macros, **element_macros(source.dtype)}
        kernel = self.kernels.get("linear.cu", "dequantize", VECTOR=8, **macros)
        row_bytes = weight.columns * ELEMENT_BYTES[source.dtype]
        step = min(self._space_bytes // row_bytes, MOST_GRID_ROWS) // UNPACKED_ROWS * UNPACKED_ROWS
        for first in range(0, weight.rows, step):
            rows = min(step, weight.rows - first)
            arguments = (weight.pointer, weight.scales, weight.minima, self._space, first, weight.columns)
            grid = (-(-weight.columns // (THREADS * 8)), rows)
            kernel(self.stream, grid, THREADS, (*arguments, weight.group or weight.columns))
            part = replace(weight, pointer=self._space, rows=rows, type=source.dtype)
            self._blas.product(self.stream, source, part, output.part(first, rows), alpha, beta)
        if weight.bias:
            self._add_bias(output, weight.bias, alpha)

    def _add_bias(self, output: Rows, bias: int, scale: float) -> None:
        v = vector(output.width, output) if bias % 16 == 0 else 1
        arguments = (output.pointer, bias, output.stride, output.width, scale)
        self._over_columns("elementwise.cu", "add_bias", output, output.width, v, arguments)


def can_stream(source: Rows, output: Rows, weight: Weight) -> bool:
    """Return whether the streaming kernel takes this product."""
    whole = 16 if weight.type == "e4m3" else 8
    aligned = weight.columns % whole == 0 and source.stride % 8 == 0
    aligned = aligned and weight.pointer % 16 == 0 and source.pointer % 16 == 0
    aligned = aligned and (not weight.is_packed or (weight.scales % 16 == 0 and weight.minima % 16 == 0))
    types = source.dtype == "bf16" and output.dtype in ("bf16", "f32")
    known = weight.type == "bf16" or weight.is_packed or (weight.type == "e4m3" and weight.group in (0, 128, weight.columns))
    return 0 < source.rows <= STREAM_ROWS and aligned and types and known


def can_pair(weight: Weight) -> bool:
    """Return whether these kernels may combine the two halves of the rows: packed ones begin with a block."""
    return weight.rows % 2 == 0 and (not weight.is_packed or weight.rows // 2 % BLOCK_ROWS == 0)


def can_rotate(layer: KvLayer, table: RopeTable) -> bool:
    """Return whether rotation and storing may be fused to the product: whole heads, in halves, into types without scales."""
    whole = table.style == "half" and 2 * table.pairs == layer.head_dim and layer.head_dim % 32 == 0
    return whole and {"e4m3", "int8"}.isdisjoint((layer.key_type, layer.value_type))
