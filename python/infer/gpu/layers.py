"""All layers of a step of few rows in one kernel (cuda/layers.cu): for which models and steps, and how it is launched."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from infer._core import InferError
from infer.gpu.arrays import ACTIVATIONS, PACKED_BITS, PAGE_TOKENS, KvLayer, RopeTable, Rows, StepInputs, Weight
from infer.gpu.attention import DECODE_WARPS, LONG, AttentionPlan, is_fast, kv_macros, packed_rows
from infer.gpu.launch import DEPENDENT
from infer.gpu.linear import can_pair, can_rotate, can_stream
from infer.gpu.many import ceil_of
from infer.gpu.scaled import ScaledOperations
from infer.gpu.stream import STREAM_WARPS, input_bytes, slot_bytes, stream_step, stream_tokens, warp_steps
from infer.gpu.warp_group import CAPABILITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

MOST_PARTS = 16
"""Most parts of a sequence's pages, which blocks attend to beside each other (cuda/layers_parts.cuh)."""

MOST_LAYER_ROWS = 2
"""Most rows of a step whose layers are one kernel: beyond, the input leaves too little room for weights that come ahead."""

WIDTHS = {"bf16": range(2048, 4096), "e4m3": range(2048, 1 << 16), "int4": range(2048, 1 << 16)}
"""Widths of rows whose layers this is faster for, by the type of weights: wider ones of bfloat16 come at memory speed anyway."""

ONE_ROW = "bf16"
"""The type of weights that this is faster for where there is one row: two were not measured."""

LEAST_STEPS = 8
"""Fewest steps of a warp that there must be room for in the ring of weights."""

QKV, ATTEND, ADDED, GATED_PAIR = range(4)  # as in cuda/layers.cuh
PLAIN_INPUT, PLAIN_OUTPUT, PLAIN_BEFORE, FROM_ATTENTION = 1, 2, 4, 8  # as in cuda/layers_words.cuh
RECORD = struct.Struct("=10Q7i2f2i4x")  # Operation in cuda/layers.cuh
COUNTER_BYTES = 256
"""Bytes before the records: the number of the next launch, which tells its set of rows, and counts that are zero between them."""
NOT_THERE = 0xFF
"""Each byte of a word that is not there yet (cuda/layers_words.cuh)."""
LAYER_WARPS = 12
FIXED_BYTES = 2 * LAYER_WARPS * RECORD.size + STREAM_WARPS * 64 + 4 * 16 + 64 * 16
"""Of a block's shared memory: operations, what warps know of attention, barriers of sums and of at most MOST_SLOTS rounds."""
MOST_SLOTS = 64
ROUND_BYTES, GROUP_ROUND_BYTES = 16896, 16384
"""Of weights that are not packed, in shared memory: as warps read them, and as warp groups do."""
PRODUCT_BYTES = 256
"""Of an input row's piece, of which there is a multiple (cuda/layers_group.cuh)."""
STRETCH = 512
"""Columns that have a unit."""


@dataclass(frozen=True)
class Layer:
    """A dense layer: attention behind a norm and added, and a gated network behind a norm and added."""

    hidden: Rows
    qkv: Rows
    attended: Rows
    inner: Rows
    both: Rows
    """Scratch for gates beside up."""
    normed: Rows
    """Scratch as wide as ``hidden``."""
    weights: tuple[Weight, Weight, Weight, Weight]
    """Of queries, keys and values; of attention's output; of gates and up; of down."""
    norms: tuple[int, int]
    epsilons: tuple[float, float]
    scales: tuple[float, float]
    """What attention's output and down's are multiplied by before they are added."""
    activation: str
    heads: int
    table: RopeTable
    pages: KvLayer

    @property
    def queries(self) -> Rows:
        """The part of ``qkv`` that holds queries."""
        return self.qkv.part(0, self.heads * self.pages.head_dim)


@dataclass(frozen=True)
class Stack:
    """Neighbouring layers, and where COUNTER_BYTES, their records, sets of rows and parts of attention are on the device."""

    layers: tuple[Layer, ...]
    pointer: int
    attention_scale: float
    softcap: float


@dataclass(frozen=True)
class _Room:
    """The shared memory of a block: rounds of weights, steps of a warp in all of them, and bytes of all."""

    slots: int
    steps: int
    shared: int


class LayerOperations(ScaledOperations):
    """Whole layers, enqueued on one stream."""

    _refuses_layers = False

    def layer_records(self, layers: Sequence[Layer]) -> NDArray[np.uint8] | None:
        """Return what a `Stack` of these keeps on the device, before the first launch; None where their steps run one by one."""
        import numpy as np

        if not self._can_stack(layers):
            return None
        blocks, records, units = self.kernels.multiprocessors, [], 0
        for number, layer in enumerate(layers):
            for operation in _operations(layer, number, number + 1 == len(layers)):
                count = operation.weight.rows // 16 if operation.weight else 0
                records.append(_record(layer, operation, count, units % blocks))
                units += count
        words = bytes([NOT_THERE]) * (2 * set_bytes(layers) + exchange_bytes(layers[0], blocks))
        return np.frombuffer((bytes(COUNTER_BYTES) + b"".join(records)).ljust(words_at(layers), b"\0") + words, np.uint8)

    def layers(self, inputs: StepInputs, plan: AttentionPlan, stack: Stack) -> bool:
        """Run all layers of a stack, if this kernel takes the step; return whether it did."""
        layer = stack.layers[0]
        takes = 0 < inputs.rows <= most_rows(layer) and plan.only_decode and not plan.plain and plan.size.length <= LONG
        if not takes or plan.window or self._refuses_layers:
            return False
        room = self._room(inputs.rows, layer)
        if room.steps < LEAST_STEPS:
            return False
        first, pages = layer.weights[0], layer.pages
        macros = {**first.macros, **kv_macros(pages), "TOKENS": self._layer_tokens(inputs.rows, first)}
        macros |= {"GROUP": layer.heads // pages.kv_heads, "SOFTCAP": int(stack.softcap > 0)}
        macros |= {"ACTIVATION": ACTIVATIONS.index(layer.activation), "DECODE_WARPS": DECODE_WARPS}
        kernel = self.kernels.get("layers.cu", "layers", **macros)
        lists = (plan.items, plan.pointer, inputs.page_table)
        shape = (5 * len(stack.layers), inputs.rows, layer.heads, pages.kv_heads, pages.pages * PAGE_TOKENS, inputs.page_stride)
        words = (stack.pointer + words_at(stack.layers), set_bytes(stack.layers))
        pointers = (stack.pointer + COUNTER_BYTES, inputs.rope_rows, inputs.slots, *lists, stack.pointer, *words)
        arguments = (*pointers, *shape, room.slots, stack.attention_scale, stack.softcap)
        try:
            kernel(self.stream, (self.kernels.multiprocessors,), LAYER_WARPS * 32, arguments, room.shared, cooperative=True)
        except InferError:  # the driver lets not so many blocks run together here, as where several processes share a GPU
            self._refuses_layers = True
            return False
        self._streamed = 0
        return True

    def _can_stack(self, layers: Sequence[Layer]) -> bool:
        if self.kernels.capability < DEPENDENT or not layers:
            return False
        first = layers[0]
        alike = all(_shape(layer) == _shape(first) for layer in layers)
        return (
            alike
            and pays(first, self._has_groups(first.weights[0]))
            and all(map(_can_run, layers))
            and self._room(1, first).steps >= LEAST_STEPS
        )

    def _room(self, rows: int, layer: Layer) -> _Room:
        """Divide the shared memory of a block, as cuda/layers.cu does."""
        weight, pages = layer.weights[0], layer.pages
        steps = 2 if PACKED_BITS.get(weight.type) == 4 else 1  # STEPS_OF_WARP in cuda/layers.cu
        tokens = self._layer_tokens(rows, weight)
        stride = 4 if tokens == 1 and weight.is_packed else 3  # SUM_STRIDE in cuda/layers_end.cuh
        sums = 4 * STREAM_WARPS * 16 * stride * 4
        fixed = ceil_of(STREAM_WARPS * tokens * 4 + sums + FIXED_BYTES, 128) * 128
        results = DECODE_WARPS * packed_rows(layer.heads // pages.kv_heads) * (pages.head_dim + 10) * 4 + 16
        if self._has_groups(weight):
            inputs = max(map(_lying_bytes, layer.weights, (True, False, True, False))) * rows
            round_bytes = GROUP_ROUND_BYTES
        else:
            inputs = max(warp_steps(own) * STREAM_WARPS * rows * input_bytes(own) for own in layer.weights)
            round_bytes = steps * STREAM_WARPS * slot_bytes(weight, rows, True) if weight.is_packed else ROUND_BYTES
        slots = min(max(0, self.kernels.shared_limit - fixed - max(results, inputs)) // round_bytes, MOST_SLOTS)
        return _Room(slots, slots * steps, fixed + slots * round_bytes + max(results, inputs))

    def _has_groups(self, weight: Weight) -> bool:
        """Return whether warp groups multiply the weight."""
        return self.kernels.capability == CAPABILITY and not weight.is_packed

    def _layer_tokens(self, rows: int, weight: Weight) -> int:
        """Return the tokens that the kernel is compiled for."""
        return rows if self._has_groups(weight) else stream_tokens(rows, weight)


def _lying_bytes(weight: Weight, is_normed: bool) -> int:
    """Return the bytes of an input row as warp groups read it: of bfloat16, or of pieces in E4M3 with units."""
    pitch = ceil_of(weight.row_bytes, PRODUCT_BYTES) * PRODUCT_BYTES
    return pitch if weight.type == "bf16" else pitch * (3 if is_normed else 2) + 4 * ceil_of(weight.columns, STRETCH)


def pays(layer: Layer, has_groups: bool) -> bool:
    """Return whether this is faster than the operations one by one; ``has_groups``: warp groups multiply the weights."""
    kind = layer.weights[0].type
    return layer.hidden.width in WIDTHS.get(kind, ()) and (kind != "bf16" or has_groups)


def most_rows(layer: Layer) -> int:
    """Return the most rows of a step for which this is faster."""
    return 1 if layer.weights[0].type == ONE_ROW else MOST_LAYER_ROWS


class Row(NamedTuple):
    """Where rows lie: at a pointer, or at a place in the set of rows of a launch."""

    place: int
    stride: int
    is_plain: bool = False


class HandedRows(NamedTuple):
    """Rows of a layer that its operations hand over, of MOST_LAYER_ROWS each."""

    qkv: Row
    attended: Row
    middle: Row
    inner: Row
    hidden: Row


def handed_rows(layer: Layer, number: int) -> HandedRows:
    """Return where a layer's rows lie in a set."""
    qkv, attention, _, down = layer.weights
    widths = (qkv.rows, attention.columns, attention.rows, down.columns, down.rows)
    starts = [sum(widths[:index]) + number * sum(widths) for index in range(len(widths))]
    return HandedRows(*(Row(2 * MOST_LAYER_ROWS * start, width) for start, width in zip(starts, widths, strict=True)))


def set_bytes(layers: Sequence[Layer]) -> int:
    """Return the bytes of a set of rows, those of all layers."""
    return handed_rows(layers[0], len(layers)).qkv.place


def words_at(layers: Sequence[Layer]) -> int:
    """Return where a stack's sets of rows begin, behind the records."""
    return ceil_of(COUNTER_BYTES + 5 * len(layers) * RECORD.size, 128) * 128


def exchange_bytes(layer: Layer, blocks: int) -> int:
    """Return the bytes of what parts of attention hand over, as in cuda/layers_parts.cuh."""
    parts = max(1, min(MOST_PARTS, blocks // layer.pages.kv_heads))
    return 8 * parts * MOST_LAYER_ROWS * layer.heads * (2 + layer.pages.head_dim)


class _Operation(NamedTuple):
    """An operation of a layer, and what its result is multiplied by and added to."""

    kind: int
    weight: Weight | None
    norm: int
    epsilon: float
    source: Row
    output: Row
    scale: float = 1.0
    before: Row = Row(0, 0)


def _operations(layer: Layer, number: int, is_last: bool) -> tuple[_Operation, ...]:
    qkv, attention, gate_up, down = layer.weights
    own, outside = handed_rows(layer, number), Row(layer.hidden.pointer, layer.hidden.stride, True)
    source, hidden = handed_rows(layer, number - 1).hidden if number else outside, outside if is_last else own.hidden
    return (
        _Operation(QKV, qkv, layer.norms[0], layer.epsilons[0], source, own.qkv),
        _Operation(ATTEND, None, 0, 0.0, own.qkv, own.attended),
        _Operation(ADDED, attention, 0, 0.0, own.attended, own.middle, layer.scales[0], source),
        _Operation(GATED_PAIR, gate_up, layer.norms[1], layer.epsilons[1], own.middle, own.inner),
        _Operation(ADDED, down, 0, 0.0, own.inner, hidden, layer.scales[1], own.middle),
    )


def _record(layer: Layer, operation: _Operation, units: int, rotation: int) -> bytes:
    """Return an operation as the kernel reads it."""
    kind, weight, norm, epsilon, source, output, scale, before = operation
    pointers = (weight.pointer, weight.scales, weight.minima, weight.bias) if weight else (0, 0, 0, 0)
    pages = (layer.pages.keys, layer.pages.values) if kind == ATTEND else (0, 0)
    table = layer.table.pointer if kind == QKV else before.place
    shape = (weight.rows, weight.columns) if weight else (0, 0)
    flags = PLAIN_INPUT * source.is_plain + PLAIN_OUTPUT * output.is_plain + PLAIN_BEFORE * before.is_plain
    flags += FROM_ATTENTION * (weight is layer.weights[1])
    numbers = (kind, source.stride, output.stride, *shape, units, rotation, scale, epsilon, flags, before.stride)
    return RECORD.pack(*pointers, norm, source.place, output.place, *pages, table, *numbers)


def _shape(layer: Layer) -> tuple[object, ...]:
    """Return what the kernel is compiled for, or given once for all layers."""
    pages, forms = layer.pages, {tuple(weight.macros.items()) for weight in layer.weights}
    caches = (pages.key_type, pages.value_type, pages.kv_heads, pages.head_dim, pages.pages)
    sizes = tuple((weight.rows, weight.columns) for weight in layer.weights)
    return (len(forms), forms.pop(), layer.activation, layer.heads, caches, sizes)


def _can_run(layer: Layer) -> bool:
    """Return whether the kernel takes this layer."""
    pages, weights = layer.pages, layer.weights
    products = (
        (layer.hidden, layer.qkv),
        (layer.attended, layer.hidden),
        (layer.hidden, layer.inner),
        (layer.inner, layer.hidden),
    )
    streamed = all(
        can_stream(source.first(1), output.first(1), weight) and output.dtype == "bf16"
        for (source, output), weight in zip(products, weights, strict=True)
    )
    whole = all(weight.columns % stream_step(weight) == 0 and weight.rows % 16 == 0 for weight in weights)
    rounds = all(weight.type != "e4m3" or weight.group in (0, weight.columns) for weight in weights)
    one_form = len({tuple(weight.macros.items()) for weight in weights}) == 1
    narrow = pages.head_dim <= 128 and layer.heads // pages.kv_heads <= 8
    attends = (
        is_fast(layer.queries, layer.attended, pages)
        and can_rotate(pages, layer.table)
        and pages.key_type == "bf16" == pages.value_type
    )
    return streamed and whole and rounds and one_form and narrow and attends and can_pair(weights[2])
