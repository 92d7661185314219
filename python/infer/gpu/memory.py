"""Memory of a running model on the device: the program's buffers, the arrays of a step, and the pages of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer._core import InferError
from infer.gpu.arrays import ELEMENT_BYTES, PAGE_TOKENS, KvLayer, Rows, StepInputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from infer._core import DeviceModel, Work
    from infer.gpu.device import Device

ROW_ARRAYS = 6  # tokens, positions, slots, rope rows, row's sequence, logit rows
SMALL_TABLES = 1 << 18  # bytes of page tables that are sooner copied whole than by columns
DRAW_BYTES = 24  # seed, position, inverse temperature, min_p
KV_TYPES = ("f32", "bf16", "f16")


class Buffers:
    """The program's buffers, of one row for each row of the largest step. Logits and routers' scores are f32."""

    def __init__(self, device: Device, model: DeviceModel, rows: int, logit_rows: int) -> None:
        logits = model.logits[0]
        self._buffers: list[Rows] = []
        for number, (name, width) in enumerate(model.buffers):
            # Neighbouring rows begin at whole 16 bytes, so that kernels may read 8 elements at once.
            dtype, stride = model.element, -(-width // 8) * 8
            count = rows
            if number == logits:
                dtype, count = "f32", logit_rows
                stride = width
            elif name == "router":
                dtype = "f32"
            pointer = device.allocate(count * stride * ELEMENT_BYTES[dtype])
            device.clear(pointer, count * stride * ELEMENT_BYTES[dtype])
            self._buffers.append(Rows(pointer, count, width, stride, dtype))

    def rows(self, place: tuple[int, int, int], rows: int) -> Rows:
        """Return columns of a buffer: (buffer, first column, width)."""
        number, offset, width = place
        return self._buffers[number].part(offset, width).first(rows)


class Plan:
    """The arrays that say what a step computes: filled in pinned memory, copied to the device at once (page tables apart)."""

    def __init__(self, device: Device, rows: int, sequences: int, pages: int, long_context_row: int) -> None:
        self._device = device
        self._long_context_row = long_context_row
        self._host = device.pinned((ROW_ARRAYS * rows + sequences + 1,), "int32")
        self._pointer = device.allocate(self._host.nbytes)
        self._host_draws = device.pinned((DRAW_BYTES * rows,), "uint8")
        self._draws = device.allocate(self._host_draws.nbytes)
        self._table = device.pinned((sequences, pages), "int32")
        self._table_pointer = device.allocate(self._table.nbytes)
        device.upload(self._pointer, self._host)
        device.upload(self._table_pointer, self._table)

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
            page_stride=self._table.shape[1],
        )

    def logit_rows(self, rows: int) -> int:
        """Return where the numbers of the rows whose logits are wanted are."""
        return self._arrays(rows)[5]

    def draws(self, rows: int) -> tuple[int, int, int, int]:
        """Return where inverse temperatures, min_p, seeds and positions of so many wanted rows are."""
        return self._draws + 16 * rows, self._draws + 20 * rows, self._draws, self._draws + 8 * rows

    def send_draws(self, work: Work, rows: int) -> tuple[list[bool], bool]:
        """Enqueue the copy of what wanted rows are drawn with, padded to so many; returns which are, and if all greedily."""
        own = self._host_draws[: DRAW_BYTES * rows]
        drawn = work.write_draws(rows, own)
        greedy = not own[16 * rows : 20 * rows].any()
        if not greedy:
            self._device.upload(self._draws, own)
        return drawn, greedy

    def _arrays(self, rows: int) -> list[int]:
        return [self._pointer + 4 * rows * array for array in range(ROW_ARRAYS + 1)]

    def send(self, work: Work, rows: int, sequences: int) -> None:
        """Enqueue the copy of a step's arrays, padded to so many rows and sequences."""
        own = self._host[: ROW_ARRAYS * rows + sequences + 1]
        work.write_rows(rows, sequences, self._long_context_row, own)
        work.write_pages(self._table)
        self._device.upload(self._pointer, own)
        tables = self._table[: work.sequences]
        if tables.nbytes <= SMALL_TABLES:
            self._device.upload(self._table_pointer, tables)
        else:
            self._device.upload_columns(self._table_pointer, self._table, len(tables), work.most_pages)


class KvPages:
    """Pages of keys and values of all layers.

    A layer's keys are (pages, kv_heads, PAGE_TOKENS, head_dim), and so are its values. A page read out is layer after layer its
    keys, then its values, in the layer's types.
    """

    def __init__(self, device: Device, model: DeviceModel, pages: int) -> None:
        self._device = device
        heads, head_dim = model.constants["kv_heads"], model.constants["head_dim"]
        elements = heads * PAGE_TOKENS * head_dim
        sizes = [elements * ELEMENT_BYTES[kind] for kinds in model.kv_layers for kind in kinds]
        base = device.allocate(sum(sizes) * pages)
        device.clear(base, sum(sizes) * pages)
        self.page_bytes = sum(sizes)
        self._parts: list[tuple[int, int]] = []  # pointer to the first page, bytes of a page
        for size in sizes:
            self._parts.append((base, size))
            base += size * pages
        self.layers = [
            KvLayer(self._parts[2 * layer][0], self._parts[2 * layer + 1][0], *kinds, heads, head_dim, pages)
            for layer, kinds in enumerate(model.kv_layers)
        ]

    def copy(self, source: int, target: int) -> None:
        """Enqueue a copy of a page over another."""
        for pointer, size in self._parts:
            self._device.copy(pointer + target * size, pointer + source * size, size)

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


def check_kv_types(model: DeviceModel) -> None:
    """Refuse types of keys and values that the GPU path does not store."""
    names = {"int8": "int8", "e4m3": "fp8"}
    for kinds in model.kv_layers:
        for kind in kinds:
            if kind not in KV_TYPES:
                known = '"auto", "float32", "bfloat16" or "float16"'
                raise InferError(f"kv_cache_dtype must be {known} with device='cuda', got {names[kind]!r}")
