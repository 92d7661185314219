"""Weights on the device: read one piece at a time into pinned memory, and copied from there while the next piece is read.

Host memory stays at two pieces, however large the model is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infer.gpu.arrays import ELEMENT_BYTES, RopeTable, Rows, Weight
from infer.gpu.device import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from infer._core import DeviceModel
    from infer.gpu.device import Device

    Reader = Callable[[int, NDArray[np.uint8]], None]
    Done = Callable[[int, int], None]

PIECE_BYTES = 64 << 20


class Staging:
    """Two pinned pieces: one is filled while the other is on its way."""

    def __init__(self, device: Device, least: int) -> None:
        self._device = device
        self.piece_bytes = max(PIECE_BYTES, least)
        self._pieces = [device.pinned((self.piece_bytes,), "uint8") for _ in range(2)]
        self._next = 0

    def load(self, pointer: int, rows: int, row_bytes: int, read: Reader, done: Done | None = None) -> None:
        """Fill device memory with rows that ``read`` gives: it fills an array with rows from a number on.

        With ``done``, all pieces go to the same place, and it enqueues what is to become of each: the first row, and how many.
        """
        most = len(self._pieces[0]) // row_bytes
        for first in range(0, rows, most):
            piece = self._pieces[self._next][: min(most, rows - first) * row_bytes]
            read(first, piece)
            # Whatever used the other piece is done once this returns, and this one's copy runs while the other is filled.
            self._device.synchronize()
            self._device.upload(pointer + (0 if done else first * row_bytes), piece)
            if done is not None:
                done(first, len(piece) // row_bytes)
            self._next = 1 - self._next

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
        Round matrices to E4M3 with a scale for each row, but for the head and what belongs to experts.

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
        widest = max([columns for rows, columns in model.matrices if rows] + [width for _, width in model.buffers])
        self._staging = Staging(device, widest * self._bytes)
        self._piece = device.allocate(self._staging.piece_bytes) if rounded else 0
        self._load_matrices(self._roundable() if rounded else set())
        self.embedding = self._embedding()
        self.positions = self._table("position")
        self.vectors = [self._vector(number) for number in range(self._vector_count())]
        self._tables = self._ropes(table_positions)
        device.synchronize()
        del self._staging

    def _roundable(self) -> set[int]:
        """Return the matrices that lose little by being rounded: not the head, nor those that choose experts."""
        router = next((number for number, (name, _) in enumerate(self._model.buffers) if name == "router"), None)
        kept = (self._model.logits[0], router)
        linear = (fields for kind, fields in self._model.steps if kind == "linear")
        return {fields["weight"] for fields in linear if fields["output"][0] not in kept}

    def _load_matrices(self, rounded: set[int]) -> None:
        experts: set[int] = set()
        for kind, fields in self._model.steps:
            if kind == "experts":
                for numbers in (fields["gate_up"], fields["down"]):
                    self.stacks[numbers[0]] = self._stack(numbers)
                    experts.update(numbers)
        for number, (rows, _) in enumerate(self._model.matrices):
            if rows and number not in experts:
                self.matrices[number] = self._rounded(number) if number in rounded else self._stack([number])

    def _rounded(self, number: int) -> Weight:
        """Load a matrix, rounding each piece on the device."""
        rows, columns = self._model.matrices[number]
        pointer, scales = self._device.allocate(rows * columns), self._device.allocate(rows * 4)

        def read(first: int, piece: NDArray[np.uint8]) -> None:
            self._model.read_matrix(number, first, piece)

        def done(first: int, count: int) -> None:
            source = Rows(self._piece, count, columns, columns, self.element)
            self._operations.round_rows(source, pointer + first * columns, scales + first * 4)

        self._staging.load(self._piece, rows, columns * self._bytes, read, done)
        bias = self._model.matrix_bias(number)
        bias_pointer = self._stacked([] if bias is None else [bias])
        return Weight(pointer, rows, columns, "e4m3", bias=bias_pointer, scales=scales, group=columns)

    def _stack(self, numbers: list[int]) -> Weight:
        """Load matrices of one shape, one after the other."""
        rows, columns = self._model.matrices[numbers[0]]
        size = rows * columns * self._bytes
        pointer = self._device.allocate(size * len(numbers))
        biases = [self._model.matrix_bias(number) for number in numbers]
        for place, number in enumerate(numbers):

            def read(first: int, piece: NDArray[np.uint8], number: int = number) -> None:
                self._model.read_matrix(number, first, piece)

            self._staging.load(pointer + place * size, rows, columns * self._bytes, read)
        bias = self._stacked([bias for bias in biases if bias is not None])
        return Weight(pointer, rows, columns, self.element, bias=bias, experts=len(numbers))

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
        pointer = self._device.allocate(rows * columns * self._bytes)

        def read(first: int, piece: NDArray[np.uint8]) -> None:
            self._model.read_table(name, first, piece)

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
