"""Weights on the device: read one piece at a time into pinned memory, and copied from there while the next piece is read.

Host memory stays at two pieces, however large the model is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from infer._core import InferError
from infer.gpu.arrays import BLOCK_ROWS, ELEMENT_BYTES, RopeTable, Rows, Weight
from infer.gpu.device import as_bytes
from infer.gpu.packing import Packed, Plan, from_row, plan, sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from infer._core import DeviceModel
    from infer.gpu.device import Device
    from infer.gpu.packing import Form

    Read = Callable[[int, NDArray[np.uint8]], None]
    Done = Callable[[int, int], None]

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class RandomRows:
    """Rows that the device makes itself: those of each part with a seed of its own."""

    parts: list[tuple[int, int]]
    columns: int
    element: str

    def fill(self, operations: Any, pointer: int, first: int, rows: int) -> None:
        """Enqueue the making of ``rows`` of them from ``first`` on."""
        begin = 0
        for count, seed in self.parts:
            own, end = max(first, begin), min(first + rows, begin + count)
            if own < end:
                target = pointer + (own - first) * self.columns * ELEMENT_BYTES[self.element]
                operations.random(target, self.element, seed, (own - begin) * self.columns, (end - own) * self.columns)
            begin += count


class Staging:
    """Two pinned pieces: one is filled while the other is on its way."""

    def __init__(self, device: Device, operations: Any, least: int) -> None:
        self._device, self._operations = device, operations
        self.piece_bytes = max(PIECE_BYTES, least)
        self._pieces = [device.pinned((self.piece_bytes,), "uint8") for _ in range(2)]
        self._next = 0

    def load(self, pointer: int, rows: int, row_bytes: int, read: Read | RandomRows, done: Done | None = None) -> None:
        """Fill device memory with rows that ``read`` gives: it fills an array with rows from a number on.

        With ``done``, all pieces go to the same place, and it enqueues what is to become of each: the first row, a multiple of
        BLOCK_ROWS, and how many.
        """
        most = len(self._pieces[0]) // row_bytes
        if done is not None:
            most = most // BLOCK_ROWS * BLOCK_ROWS
        for first in range(0, rows, most):
            count, target = min(most, rows - first), pointer + (0 if done else first * row_bytes)
            if isinstance(read, RandomRows):
                read.fill(self._operations, target, first, count)
            else:
                piece = self._pieces[self._next][: count * row_bytes]
                read(first, piece)
                # Whatever used the other piece is done once this returns, and this one's copy runs while the other is filled.
                self._device.synchronize()
                self._device.upload(target, piece)
                self._next = 1 - self._next
            if done is not None:
                done(first, count)

    def load_array(self, pointer: int, array: NDArray[Any]) -> None:
        """Fill device memory with an array."""
        values = as_bytes(array)

        def read(first: int, piece: NDArray[np.uint8]) -> None:
            piece[:] = values[first : first + len(piece)]

        self.load(pointer, len(values), 1, read)


class Weights:
    """All weights of a model on the device.

    Parameters
    ----------
    device, operations
        The device and its kernels.
    model
        Where weights come from.
    table_positions
        How many positions the tables of cosines and sines have.
    rounded
        Round matrices that are not packed to E4M3 with a scale for each row, but for the head and what belongs to experts.

    Attributes
    ----------
    matrices
        Number of a matrix -> where it is. Matrices of experts are parts of stacks.
    stacks
        First matrix of a step's experts -> all of them, one after the other.
    vectors
        Number of a norm -> pointers to its f32 weight and bias (0 for none), and how many values the weight has.
    """

    def __init__(self, device: Device, operations: Any, model: DeviceModel, table_positions: int, rounded: bool) -> None:
        self._device, self._operations, self._model = device, operations, model
        self.element = model.element
        self._bytes = ELEMENT_BYTES[self.element]
        self.matrices: dict[int, Weight] = {}
        self.stacks: dict[int, Weight] = {}
        widest = max([columns for rows, columns in model.matrices if rows] + [width for _, width, _ in model.buffers])
        self._staging = Staging(device, operations, widest * 4 * BLOCK_ROWS)
        self._piece = device.allocate(self._staging.piece_bytes)
        self._refused = device.allocate(4)
        device.clear(self._refused, 4)
        self._load_matrices(self._roundable() if rounded else set())
        self.embedding = self._embedding()
        self.positions = self._table("position")
        self.vectors = [self._vector(number) for number in range(self._vector_count())]
        self._tables = self._ropes(table_positions)
        self._check_refused()
        device.give_back(self._piece)
        del self._staging

    def _check_refused(self) -> None:
        """Wait for everything, and raise if a weight could not be rounded."""
        refused = self._device.pinned((1,), "int32")
        self._device.download(refused, self._refused)
        self._device.synchronize()
        if refused[0]:
            raise InferError("quantization: a weight is not finite, or its magnitude exceeds 65504; leave quantization away")

    def _roundable(self) -> set[int]:
        """Return the matrices that lose little by being rounded: not the head, nor those that choose experts."""
        router = next((number for number, (name, *_) in enumerate(self._model.buffers) if name == "router"), None)
        kept = (self._model.logits[0], router)
        linear = (fields for kind, fields in self._model.steps if kind == "linear")
        return {fields["weight"] for fields in linear if fields["output"][0] not in kept}

    def _load_matrices(self, rounded: set[int]) -> None:
        experts: set[int] = set()
        for kind, fields in self._model.steps:
            if kind == "experts":
                for numbers in (fields["gate_up"], fields["down"]):
                    self.stacks[numbers[0]] = self._loaded(numbers, False)
                    experts.update(numbers)
        for number, (rows, _) in enumerate(self._model.matrices):
            if rows and number not in experts:
                self.matrices[number] = self._loaded([number], number in rounded)

    def _loaded(self, numbers: list[int], rounded: bool) -> Weight:
        """Load matrices of one shape, one after the other: as they are or packed if they can be, else rounded or expanded."""
        groups = {self._model.matrix_group(number) for number in numbers}
        if len(groups) == 1 and (group := groups.pop()) is not None:
            return self._scaled(numbers, group)
        how = plan(chain.from_iterable(self._model.matrix_formats(number) for number in numbers))
        if how is not None and (len(numbers) == 1 or self._model.matrices[numbers[0]][0] % BLOCK_ROWS == 0):
            return self._packed(numbers, how)
        return self._rounded(numbers[0]) if rounded else self._stack(numbers)

    def _scaled(self, numbers: list[int], group: int) -> Weight:
        """Load matrices that are stored in E4M3 with scales."""
        rows, columns = self._model.matrices[numbers[0]]
        pointer = self._device.allocate(rows * columns * len(numbers))
        for place, number in enumerate(numbers):
            self._staging.load(pointer + place * rows * columns, rows, columns, self._reader(number, "stored"))
        scales = self._stacked([self._model.matrix_scales(number) for number in numbers])
        bias, experts = self._biases(numbers), len(numbers)
        return Weight(pointer, rows, columns, "e4m3", bias=bias, scales=scales, group=group, experts=experts)

    def _packed(self, numbers: list[int], how: Plan) -> Weight:
        """Load matrices packed, each piece by the device."""
        rows, columns = self._model.matrices[numbers[0]]
        bias = self._biases(numbers)
        whole = self._packed_memory(rows * len(numbers), columns, how.packed)
        for place, number in enumerate(numbers):
            self._fill(from_row(whole, place * rows), rows, how, self._reader(number, how.form))
        return replace(whole, rows=rows, bias=bias, experts=len(numbers))

    def _packed_memory(self, rows: int, columns: int, packed: Packed) -> Weight:
        pointer, scales, minima = (self._device.allocate(size) if size else 0 for size in sizes(rows, columns, packed))
        more = {"scales": scales, "minima": minima, "group": packed.group}
        return Weight(pointer, rows, columns, packed.type, **more, steps=packed.steps)

    def _fill(self, weight: Weight, rows: int, how: Plan, read: Read | RandomRows) -> None:
        def done(first: int, count: int) -> None:
            self._operations.pack(self._piece, from_row(weight, first), how, count, self._refused)

        self._staging.load(self._piece, rows, how.row_bytes(weight.columns), read, done)

    def _reader(self, number: int, form: Form | None = None) -> Read | RandomRows:
        """Return what gives a matrix's rows: the core, or the device where they are random."""
        parts = self._model.random_matrix(number)
        if parts is not None:
            return RandomRows(parts, self._model.matrices[number][1], form or self.element)
        return lambda first, piece: self._model.read_matrix(number, first, piece, form)

    def _biases(self, numbers: list[int]) -> int:
        biases = [self._model.matrix_bias(number) for number in numbers]
        return self._stacked([bias for bias in biases if bias is not None])

    def _rounded(self, number: int) -> Weight:
        """Load a matrix, rounding each piece on the device."""
        rows, columns = self._model.matrices[number]
        pointer, scales = self._device.allocate(rows * columns), self._device.allocate(rows * 4)

        def done(first: int, count: int) -> None:
            source = Rows(self._piece, count, columns, columns, self.element)
            self._operations.round_rows(source, pointer + first * columns, scales + first * 4)

        self._staging.load(self._piece, rows, columns * self._bytes, self._reader(number), done)
        return Weight(pointer, rows, columns, "e4m3", bias=self._biases([number]), scales=scales, group=columns)

    def _stack(self, numbers: list[int]) -> Weight:
        """Load matrices of one shape, one after the other."""
        rows, columns = self._model.matrices[numbers[0]]
        size = rows * columns * self._bytes
        pointer = self._device.allocate(size * len(numbers))
        for place, number in enumerate(numbers):
            self._staging.load(pointer + place * size, rows, columns * self._bytes, self._reader(number))
        return Weight(pointer, rows, columns, self.element, bias=self._biases(numbers), experts=len(numbers))

    def _stacked(self, arrays: list[NDArray[np.float32]]) -> int:
        """Load arrays one after the other; 0 for none."""
        import numpy as np

        if not arrays:
            return 0
        array = np.concatenate(arrays)
        pointer = self._device.allocate(array.nbytes)
        self._staging.load_array(pointer, array)
        return pointer

    def _embedding(self) -> Weight:
        """Return the head where it is the embedding too; the tokens are its first rows."""
        tied = self._model.tied_head
        found = self.matrices[tied] if tied is not None else self._table("embedding")
        return found if found is not None else self.matrices[0]

    def _table(self, name: str) -> Weight | None:
        shape = self._model.table_shape(name)
        if shape is None:
            return None
        rows, columns = shape

        # Positions are added, which only knows plain tables.
        how = plan([self._model.table_formats(name)]) if name == "embedding" else None
        form, seed = how and how.form, self._model.random_table(name)

        def stored(first: int, piece: NDArray[np.uint8]) -> None:
            self._model.read_table(name, first, piece, form)

        read = stored if seed is None else RandomRows([(rows, seed)], columns, form or self.element)
        if how is not None:
            table = self._packed_memory(rows, columns, how.packed)
            self._fill(table, rows, how, read)
            return table
        pointer = self._device.allocate(rows * columns * self._bytes)
        self._staging.load(pointer, rows, columns * self._bytes, read)
        return Weight(pointer, rows, columns, self.element)

    def _vector_count(self) -> int:
        return max((fields["weight"] + 1 for kind, fields in self._model.steps if kind == "norm"), default=0)

    def _vector(self, number: int) -> tuple[int, int, int]:
        weight, bias = self._model.vector(number)
        return self._stacked([weight]), self._stacked([] if bias is None else [bias]), len(weight)

    def rope(self, number: int, style: str) -> RopeTable:
        """Return a table of cosines and sines for pairs of a style."""
        return replace(self._tables[number], style=style)

    def _ropes(self, positions: int) -> list[RopeTable]:
        """Load the cosines and sines of all positions, and below them those of long contexts, where a model has such."""
        tables = []
        for rope, rotary_dim in enumerate(self._model.constants["rotary_dims"]):
            kinds = [False] if self._model.constants["context_switch"] is None else [False, True]
            rows = [self._model.rotations(rope, positions, long_context=kind).reshape(-1) for kind in kinds]
            tables.append(RopeTable(self._stacked(rows), rotary_dim // 2))
        return tables
