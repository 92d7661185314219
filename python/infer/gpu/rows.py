"""Operations on rows alone: lookups, norms, activations, sums. One method per kernel; each only enqueues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer.gpu.arrays import ACTIVATIONS, ELEMENT_BYTES, Rows, c_type
from infer.gpu.launch import DEPENDENT

if TYPE_CHECKING:
    from infer.gpu.arrays import StepInputs, Weight
    from infer.gpu.kernels import Kernels

STREAM_ROWS = 16
"""Most rows whose products are streamed, by linear_stream.cu."""

THREADS = 128
WARP = 32


def vector(width: int, *rows: Rows) -> int:
    """Return how many neighbouring elements a thread may read at once: 8 where everything is aligned to them."""
    aligned = all(part.stride % 8 == 0 and part.pointer % 16 == 0 for part in rows)
    return 8 if width % 8 == 0 and aligned else 1


def element_macros(dtype: str) -> dict[str, int | str]:
    """Return the macros that choose the type of activations."""
    return {"INFER_F32": 1} if dtype == "f32" else {}


def norm_threads(width: int, elements: int) -> int:
    """Return the threads of a block that normalises a row."""
    return min(1024, max(WARP, -(-width // elements // WARP) * WARP))


HELD_VECTORS = 4
"""Vectors of 8 values of a row that a thread keeps in registers, at most: VECTORS in cuda/norm.cu and cuda/activation.cu."""

MOST_NORM_THREADS, MOST_HELD_THREADS = 512, 1024
"""Threads of a block that keeps a row in registers, with a norm's weight or without."""
ROW_THREADS, ROW_BYTES = 768, 128
"""Threads that normalise or round rows on a multiprocessor, where its blocks take one row after the other, and bytes of
shared memory of each."""
AHEAD_THREADS = 1024
"""Threads that round activations on a multiprocessor, where its blocks take one row after the other."""
SHARED_WIDTH, SHARED_VECTORS = 8192, 7
"""Rows with more values are rounded by two blocks each, where there are multiprocessors for both, and vectors of each of their
threads: blocks so small that they find room beside those of products (cuda/README.md)."""
MANY_ROWS = 256
"""From so many rows on, an activation's threads take several vectors each."""


def held_threads(width: int) -> int:
    """Return the threads of a block that keeps a row in registers, as vectors of 8 values."""
    return max(WARP, -(-width // (8 * HELD_VECTORS) // WARP) * WARP)


def norm_shape(width: int, weight: int, *rows: Rows) -> tuple[int, int]:
    """Return the elements that a norm's thread takes at once, and the threads of a block."""
    v = vector(width, *rows) if weight % 16 == 0 and held_threads(width) <= MOST_NORM_THREADS else 1
    return v, held_threads(width) if v == 8 else norm_threads(width, v)


class RowOperations:
    """Operations on rows, enqueued on one stream."""

    def __init__(self, kernels: Kernels, stream: int) -> None:
        self.kernels = kernels
        self.stream = stream

    def _over_columns(
        self, file: str, name: str, rows: Rows, width: int, v: int, arguments: tuple[int | float, ...], **macros: int | str
    ) -> None:
        """Launch a kernel whose threads take ``v`` columns of one row each, or VECTORS times as many."""
        if rows.rows == 0:
            return
        kernel = self.kernels.get(file, name, VECTOR=v, **element_macros(rows.dtype), **macros)
        each = THREADS * v * int(macros.get("VECTORS", 1))
        kernel(self.stream, (-(-width // each), rows.rows), THREADS, arguments)

    def embed(self, inputs: StepInputs, table: Weight, output: Rows, scale: float = 1.0) -> None:
        """``output[row] = scale * table[token]`` of each row's token, which may be what the step before chose."""
        v = vector(output.width, output) if table.pointer % 16 == 0 else 1
        pointers = (table.pointer, table.scales, table.minima, inputs.tokens, inputs.chosen, output.pointer)
        shape = (table.rows, output.stride, output.width, table.group or table.columns)
        self._over_columns("rows.cu", "embed", output, output.width, v, (*pointers, *shape, scale), **table.macros)

    def add_position(self, inputs: StepInputs, table: Weight, rows: Rows) -> None:
        """``rows[row] += table[positions[row]]``."""
        v = vector(rows.width, rows) if table.pointer % 16 == 0 else 1
        arguments = (table.pointer, inputs.positions, rows.pointer, table.rows, rows.stride, rows.width)
        self._over_columns("rows.cu", "add_position", rows, rows.width, v, arguments, **table.macros)

    def select(self, source: Rows, wanted: int, output: Rows) -> None:
        """``output[row] = source[wanted[row]]``; ``wanted`` is int32 (output rows) on the device."""
        v = vector(output.width, source, output)
        arguments = (source.pointer, wanted, output.pointer, source.stride, output.stride, output.width)
        self._over_columns("rows.cu", "select", output, output.width, v, arguments)

    def norm(
        self,
        source: Rows,
        output: Rows,
        kind: str,
        epsilon: float,
        weight: int,
        bias: int = 0,
        groups: int = 1,
        per_group: bool = False,
    ) -> None:
        """``output = norm(source)`` in ``groups`` groups per row, ``kind`` "rms" or "layer"; both may be the same rows.

        weight and bias are f32, 0 for none: (width / groups), which the groups share, or (width) if ``per_group``.
        """
        width = source.width // groups
        v, threads = norm_shape(width, weight, source, output) if groups == 1 else (vector(width, source, output), 4 * WARP)
        is_layer = int(kind == "layer")
        macros = {"VECTOR": v, "LAYER_NORM": is_layer, **element_macros(source.dtype)}
        pointers = (source.pointer, output.pointer, weight, bias, source.stride, output.stride, width)
        if source.rows == 0:
            return
        if groups == 1 and v == 8:
            self._over_rows("norm_rows", source, threads, (*pointers, source.rows, epsilon), LAYER_NORM=is_layer)
        elif groups == 1:
            kernel = self.kernels.get("norm.cu", "norm_rows", **macros)
            kernel(self.stream, (source.rows,), threads, (*pointers, source.rows, epsilon))
        else:
            kernel = self.kernels.get("norm.cu", "norm_groups", **macros)
            step = width if per_group else 0
            kernel(self.stream, (-(-groups // 4), source.rows), threads, (*pointers, groups, step, epsilon))

    def norm_round(self, source: Rows, output: int, scales: int, epsilon: float, weight: int) -> None:
        """Round the root-mean-square norm of each row, bf16, to E4M3 numbers, (rows, width), times its scale, f32 (rows).

        The same as ``norm`` and then ``round_rows``, bit for bit; for rows that ``norm_shape`` gives vectors of 8.
        """
        arguments = (source.pointer, output, scales, weight, source.stride, source.width, source.rows, epsilon)
        self._over_rows("norm_round", source, held_threads(source.width), arguments)

    def round_held(self, source: Rows, output: int, scales: int) -> bool:
        """Round each row, bf16, to E4M3 as ``norm_round`` does, unless it is too wide to be kept in registers or not aligned."""
        if vector(source.width, source) != 8 or held_threads(source.width) > MOST_HELD_THREADS:
            return False
        arguments = (source.pointer, output, scales, source.stride, source.width, source.rows)
        is_few = 2 * source.rows <= self.kernels.multiprocessors and self.kernels.capability >= DEPENDENT
        if is_few and source.width > SHARED_WIDTH:
            threads = -(-source.width // (2 * 8 * SHARED_VECTORS * WARP)) * WARP
            kernel = self.kernels.get("norm.cu", "round_rows", VECTOR=8, VECTORS=SHARED_VECTORS, SHARES=2)
            kernel(self.stream, (2 * source.rows,), threads, arguments, 0, 2)
            return True
        self._over_rows("round_rows", source, held_threads(source.width), arguments)
        return True

    def _over_rows(self, name: str, rows: Rows, threads: int, arguments: tuple[int | float, ...], **macros: int | str) -> None:
        """Launch a kernel of cuda/norm.cu that keeps rows in registers: a block for each, or as many as run at once."""
        blocks, shared = self.kernels.multiprocessors * max(1, -(-ROW_THREADS // threads)), ROW_BYTES * threads
        is_long = rows.rows > 2 * blocks and rows.dtype == "bf16" and shared <= self.kernels.shared_limit - 1024
        kernel = self.kernels.get("norm.cu", name, VECTOR=8, AHEAD=int(is_long), **element_macros(rows.dtype), **macros)
        kernel(self.stream, (blocks if is_long else rows.rows,), threads, arguments, shared if is_long else 0)

    def add_norm(
        self,
        hidden: Rows,
        branch: Rows,
        scale: float,
        output: Rows,
        kind: str,
        epsilon: float,
        weight: int,
        bias: int = 0,
    ) -> None:
        """``hidden += scale * branch``, then ``output = norm(hidden)``, in one kernel."""
        if hidden.rows == 0:
            return
        v, threads = norm_shape(hidden.width, weight, hidden, branch, output)
        macros = {"VECTOR": v, "LAYER_NORM": int(kind == "layer"), **element_macros(hidden.dtype)}
        pointers = (hidden.pointer, branch.pointer, output.pointer, weight, bias)
        strides = (hidden.stride, branch.stride, output.stride, hidden.width)
        kernel = self.kernels.get("norm.cu", "add_norm", **macros)
        kernel(self.stream, (hidden.rows,), threads, (*pointers, *strides, scale, epsilon))

    def gated_activation(self, gate: Rows, up: Rows, output: Rows, name: str) -> None:
        """``output = activation(gate) * up``."""
        v = vector(output.width, gate, up, output)
        pointers = (gate.pointer, up.pointer, output.pointer, gate.stride, up.stride, output.stride, output.width)
        macros: dict[str, int | str] = {"ACTIVATION": ACTIVATIONS.index(name)}
        if v == 8 and output.rows >= MANY_ROWS:
            macros["VECTORS"] = HELD_VECTORS
        self._over_columns("activation.cu", "gated_activation", output, output.width, v, pointers, **macros)

    def gated_round(self, gate: Rows, up: Rows, output: int, scales: int, name: str) -> None:
        """Round ``activation(gate) * up``, bf16, to E4M3 numbers, (rows, width), times each row's scale, f32 (rows).

        The same as ``gated_activation`` and then ``round_rows``, bit for bit.
        """
        threads = held_threads(gate.width)
        blocks, ahead = self.kernels.multiprocessors * max(1, AHEAD_THREADS // threads), HELD_VECTORS * 32 * threads
        is_long = gate.rows > 2 * blocks and ahead <= self.kernels.shared_limit - 1024
        macros = {"VECTOR": 8, "VECTORS": HELD_VECTORS, "ACTIVATION": ACTIVATIONS.index(name), "AHEAD": int(is_long)}
        kernel = self.kernels.get("activation.cu", "gated_round", **macros)
        arguments = (gate.pointer, up.pointer, output, scales, gate.stride, up.stride, gate.width, gate.rows)
        grid, shared = (blocks, ahead) if is_long else (gate.rows, 0)
        kernel(self.stream, (grid,), threads, arguments, shared)

    def activation(self, rows: Rows, name: str) -> None:
        """``rows = activation(rows)``."""
        arguments = (rows.pointer, rows.stride, rows.width)
        v, number = vector(rows.width, rows), ACTIVATIONS.index(name)
        self._over_columns("activation.cu", "activation", rows, rows.width, v, arguments, ACTIVATION=number)

    def add(self, destination: Rows, source: Rows, scale: float = 1.0) -> None:
        """``destination += scale * source``."""
        v = vector(destination.width, destination, source)
        arguments = (destination.pointer, source.pointer, destination.stride, source.stride, destination.width, scale)
        self._over_columns("elementwise.cu", "add", destination, destination.width, v, arguments)

    def add_gated(self, destination: Rows, source: Rows, gate: Rows) -> None:
        """``destination += sigmoid(gate) * source``; gate is (rows, 1), "bf16" or "f32"."""
        v = vector(destination.width, destination, source)
        pointers = (destination.pointer, source.pointer, gate.pointer)
        strides = (destination.stride, source.stride, gate.stride, destination.width)
        kind = c_type(gate.dtype)
        self._over_columns("elementwise.cu", "add_gated", destination, destination.width, v, (*pointers, *strides), GATE=kind)

    def scale(self, rows: Rows, factor: float) -> None:
        """``rows *= factor``."""
        arguments = (rows.pointer, rows.stride, rows.width, factor)
        self._over_columns("elementwise.cu", "scale", rows, rows.width, vector(rows.width, rows), arguments)

    def softcap(self, rows: Rows, cap: float) -> None:
        """``rows = cap * tanh(rows / cap)``."""
        arguments = (rows.pointer, rows.stride, rows.width, cap)
        self._over_columns("elementwise.cu", "softcap", rows, rows.width, vector(rows.width, rows), arguments)


def weight_bytes(weight: Weight) -> int:
    """Return the bytes of a weight's elements, without scales."""
    return weight.experts * weight.rows * weight.columns * ELEMENT_BYTES[weight.type]
