"""Memory of a running model on the device: the program's buffers, the arrays of a step, and the pages of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infer._core import InferError
from infer.gpu.arrays import (
    DRAW_BYTES,
    ELEMENT_BYTES,
    LOGPROB_VALUES,
    MOST_BRANCHES,
    MOST_DRAW_WORDS,
    PAGE_TOKENS,
    Draws,
    KvLayer,
    Rows,
    StepInputs,
    key_scales,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from infer._core import DeviceModel, Work
    from infer.gpu.device import Device

ROW_ARRAYS = 6  # tokens, positions, slots, rope rows, row's sequence, logit rows
SMALL_TABLES = 1 << 18  # bytes of page tables that are sooner copied whole than by columns
STEPS_AT_ONCE = 2  # that the engine begins before it waits for the first


class Buffers:
    """The program's buffers, of one row for each row of the largest step, or each whose logits it gives.

    Logits and routers' scores are f32.
    """

    def __init__(self, device: Device, model: DeviceModel, rows: int, logit_rows: int) -> None:
        logits = model.logits[0]
        self._buffers: list[Rows] = []
        for number, (name, width, wanted) in enumerate(model.buffers):
            # Neighbouring rows begin at whole 16 bytes, so that kernels may read 8 elements at once.
            dtype, stride = model.element, -(-width // 8) * 8
            count = logit_rows if wanted else rows
            if number == logits:
                dtype, stride = "f32", width
            elif name == "router":
                dtype = "f32"
            pointer = device.allocate(count * stride * ELEMENT_BYTES[dtype])
            device.clear(pointer, count * stride * ELEMENT_BYTES[dtype])
            self._buffers.append(Rows(pointer, count, width, stride, dtype))
        self._parts: dict[tuple[int, int, int], Rows] = {}

    def rows(self, place: tuple[int, int, int], rows: int) -> Rows:
        """Return columns of a buffer: (buffer, first column, width)."""
        if (part := self._parts.get(place)) is None:
            number, offset, width = place
            part = self._parts[place] = self._buffers[number].part(offset, width)
        return part.first(rows)


def _behind_rows(sequences: int) -> int:
    """Return how many values follow the arrays of rows: each sequence's first row, and copies."""
    return sequences + 1 + 2 * MOST_BRANCHES


class _PinnedPlan:
    """What one step's arrays are copied from."""

    def __init__(self, device: Device, rows: int, sequences: int, pages: int) -> None:
        self.rows = device.pinned((ROW_ARRAYS * rows + _behind_rows(sequences),), "int32")
        self.draws = device.pinned((DRAW_BYTES * rows,), "uint8")
        self.words = device.pinned((MOST_DRAW_WORDS,), "uint32")
        self.table = device.pinned((sequences, pages), "int32")


class Plan:
    """The arrays that say what a step computes: filled in pinned memory, copied to the device at once (page tables apart).

    Each step has the half of the pinned memory that the last one did not have: that may not have been copied yet. ``chosen`` is
    where the device keeps what the last step chose. Steps without Python are filled in here, too (rust/bindings/src/launcher.rs).
    """

    def __init__(self, device: Device, rows: int, sequences: int, pages: int, long_context_row: int, chosen: int) -> None:
        self._device, self._chosen = device, chosen
        self._long_context_row = long_context_row
        self.halves = [_PinnedPlan(device, rows, sequences, pages) for _ in range(STEPS_AT_ONCE)]
        self._host = self.halves[0]
        self._pointer = device.allocate(self._host.rows.nbytes)
        self.draws = Draws(
            device.allocate(self._host.draws.nbytes),
            device.allocate(self._host.words.nbytes),
            device.allocate(8 * rows),
            device.allocate(4 * LOGPROB_VALUES * rows),
        )
        device.clear(self.draws.told, 4 * LOGPROB_VALUES * rows)  # which is copied with rows that want none
        self._table_pointer = device.allocate(self._host.table.nbytes)
        device.upload(self._pointer, self._host.rows)
        device.upload(self._table_pointer, self._host.table)

    def turn(self, half: int) -> None:
        """Begin another step, whose arrays are in this half."""
        self._host = self.halves[half]

    @property
    def places(self) -> tuple[int, int, int, int]:
        """Where rows, draws, their words, and page tables are on the device."""
        return self._pointer, self.draws.pointer, self.draws.words, self._table_pointer

    def inputs(self, rows: int, sequences: int) -> StepInputs:
        """Return where the arrays of a step of so many rows and sequences, padding included, are."""
        tokens, positions, slots, rope_rows, row_sequence, _, first_row = self._arrays(rows)
        return StepInputs(
            rows=rows,
            sequences=sequences,
            tokens=tokens,
            positions=positions,
            slots=slots,
            rope_rows=rope_rows,
            row_sequence=row_sequence,
            first_row=first_row,
            page_table=self._table_pointer,
            page_stride=self._host.table.shape[1],
            chosen=self._chosen,
            copies=first_row + 4 * (sequences + 1),
        )

    def logit_rows(self, rows: int) -> int:
        """Return where the numbers of the rows whose logits are wanted are."""
        return self._arrays(rows)[5]

    def send_draws(self, work: Work, rows: int) -> None:
        """Enqueue the copy of how wanted rows are drawn, padded to so many."""
        own = self._host.draws[: DRAW_BYTES * rows]
        count = work.write_draws(rows, own, self._host.words)
        self._device.upload(self.draws.pointer, own)
        if count:
            self._device.upload(self.draws.words, self._host.words[:count])

    def _arrays(self, rows: int) -> list[int]:
        return [self._pointer + 4 * rows * array for array in range(ROW_ARRAYS + 1)]

    def send(self, work: Work, rows: int, sequences: int) -> None:
        """Enqueue the copy of a step's arrays, padded to so many rows and sequences."""
        own, table = self._host.rows[: ROW_ARRAYS * rows + _behind_rows(sequences)], self._host.table
        work.write_rows(rows, sequences, self._long_context_row, own)
        work.write_pages(table)
        self._device.upload(self._pointer, own)
        tables = table[: work.sequences]
        if tables.nbytes <= SMALL_TABLES:
            self._device.upload(self._table_pointer, tables)
        else:
            self._device.upload_columns(self._table_pointer, table, len(tables), work.most_pages)


@dataclass(frozen=True)
class Parts:
    """What a page consists of in all layers, for kernels that copy pages."""

    pointer: int
    """uint64 (count, 2): where the first page's part lies, bytes of a page's part."""
    count: int

    @classmethod
    def put(cls, device: Device, parts: list[tuple[int, int]]) -> Parts:
        """Keep them on the device."""
        import numpy as np

        array = np.array(parts, np.uint64)
        pointer = device.allocate(array.nbytes)
        device.upload(pointer, array)
        device.synchronize()  # the array is not kept here
        return cls(pointer, len(parts))


class KvPages:
    """Pages of keys and values of all layers.

    A layer's keys are (pages, kv_heads, PAGE_TOKENS, head_dim), and so are its values; 8-bit ones have scales, f32 (pages,
    kv_heads, PAGE_TOKENS), or several for a key. A page read out is layer after layer its keys, then its values, each with their
    scales behind them.
    """

    def __init__(self, device: Device, model: DeviceModel, pages: int) -> None:
        self._device = device
        heads, head_dim = model.constants["kv_heads"], model.constants["head_dim"]
        sizes = []
        for keys, values in model.kv_layers:
            for kind, scales in ((keys, key_scales(keys, head_dim)), (values, min(key_scales(values, head_dim), 1))):
                tokens = heads * PAGE_TOKENS
                sizes.append((tokens * head_dim * ELEMENT_BYTES[kind], tokens * scales * 4))
        self.page_bytes = sum(map(sum, sizes))
        base = device.allocate(self.page_bytes * pages)
        device.clear(base, self.page_bytes * pages)
        self._parts: list[tuple[int, int]] = []  # pointer to the first page, bytes of a page
        for size in (size for both in sizes for size in both):
            self._parts.append((base, size))
            base += size * pages
        self.layers = [
            self._layer(self._parts[4 * layer : 4 * layer + 4], *kinds, heads, head_dim, pages)
            for layer, kinds in enumerate(model.kv_layers)
        ]
        self._parts = [(pointer, size) for pointer, size in self._parts if size]
        self.parts = Parts.put(device, self._parts)

    @staticmethod
    def _layer(parts: list[tuple[int, int]], keys: str, values: str, heads: int, head_dim: int, pages: int) -> KvLayer:
        pointers = [pointer if size else 0 for pointer, size in parts]
        return KvLayer(pointers[0], pointers[2], keys, values, heads, head_dim, pages, pointers[1], pointers[3])

    def read(self, page: int, out: NDArray[np.uint8]) -> None:
        """Enqueue copies of a page to the host."""
        for pointer, size, part in self._divided(page, out):
            self._device.download(part[:size], pointer)

    def write(self, page: int, contents: NDArray[np.uint8]) -> None:
        """Enqueue copies of a page from the host."""
        for pointer, size, part in self._divided(page, contents):
            self._device.upload(pointer, part[:size])

    def _divided(self, page: int, whole: NDArray[np.uint8]) -> list[tuple[int, int, NDArray[Any]]]:
        if len(whole) != self.page_bytes:
            raise InferError(f"a page takes {self.page_bytes} bytes, got {len(whole)}")
        parts, start = [], 0
        for pointer, size in self._parts:
            parts.append((pointer + page * size, size, whole[start : start + size]))
            start += size
        return parts
