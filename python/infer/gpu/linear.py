"""Products of rows with weight matrices: which kernel runs, and how it is launched.

Few rows stream the weights through one kernel (cuda/linear_stream.cu), with what surrounds the product fused in; more go to
cuBLASLt; what neither takes, for its type, shape or alignment, to the plain kernel (cuda/linear.cu).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import ACTIVATIONS, ELEMENT_BYTES, PAGE_TOKENS, KvLayer, RopeTable, Rows, StepInputs, Weight, c_type
from infer.gpu.attention import AttentionOperations, kv_macros
from infer.gpu.blas import Blas, can_multiply
from infer.gpu.rows import element_macros, vector

if TYPE_CHECKING:
    from infer.gpu.kernels import Kernels

STREAM_ROWS = 16
"""Most rows that are streamed: beyond, cuBLASLt reads the weights as fast and computes faster."""

STORE, ADD, GATED = 0, 1, 2
WARPS = 8  # of the plain kernel
TILE = 16  # weight rows of a matrix instruction


class _Launch(NamedTuple):
    """How a streaming product runs."""

    macros: dict[str, int | str]
    blocks: int
    warps: int
    shared: int


class LinearOperations(AttentionOperations):
    """Matrix products, enqueued on one stream. ``workspace`` is device memory that no one else uses on this stream."""

    def __init__(self, kernels: Kernels, stream: int, workspace: int, workspace_bytes: int) -> None:
        super().__init__(kernels, stream)
        self._blas = Blas(workspace, workspace_bytes)

    def linear(self, source: Rows, output: Rows, weight: Weight) -> None:
        """``output = source * weight^T + bias``."""
        if source.rows == 0:
            return
        if can_stream(source, output, weight):
            self._stream(source, output, weight, STORE)
        elif can_multiply(source, weight, output):
            self._blas.product(self.stream, source, weight, output)
            if weight.bias:
                self._add_bias(output, weight.bias, 1.0)
        else:
            self._linear_plainly(source, output, weight, 0.0)

    def linear_add(self, source: Rows, destination: Rows, weight: Weight, scale: float = 1.0) -> None:
        """``destination += scale * (source * weight^T + bias)``."""
        if source.rows == 0:
            return
        if can_stream(source, destination, weight):
            self._stream(source, destination, weight, ADD, add=scale)
        elif can_multiply(source, weight, destination):
            self._blas.product(self.stream, source, weight, destination, alpha=scale, beta=1.0)
            if weight.bias:
                self._add_bias(destination, weight.bias, scale)
        else:
            self._linear_plainly(source, destination, weight, scale)

    def linear_gated(self, source: Rows, output: Rows, weight: Weight, activation: str, scratch: Rows) -> None:
        """``output = activation(gate) * up``, where the weight's rows are the gate's and then up's.

        ``scratch`` is (rows, 2 * width), used where the two steps are not fused.
        """
        width = weight.rows // 2
        if can_stream(source, output, weight):
            self._stream(source, output, weight, GATED, activation=activation)
            return
        self.linear(source, scratch.part(0, weight.rows), weight)
        self.gated_activation(scratch.part(0, width), scratch.part(width, width), output, activation)

    def norm_linear(self, source: Rows, output: Rows, weight: Weight, norm: int, epsilon: float, scratch: Rows) -> None:
        """``output = rms_norm(source) * weight^T + bias``; ``norm`` is the norm's weight, ``scratch`` as wide as the source."""
        if can_stream(source, output, weight):
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
        if can_stream(source, output, weight):
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
    ) -> None:
        """``rms_norm(source) * weight^T + bias``, queries and keys rotated, keys and values stored.

        ``norm`` 0 is none, else its weight (columns); ``scratch`` is as wide as the source. Of ``qkv``, (rows, (heads + 2 *
        kv_heads) * head_dim), only the queries are defined afterwards.
        """
        if not (can_stream(source, qkv, weight) and can_rotate(layer, table)):
            if norm:
                self.norm_linear(source, qkv, weight, norm, epsilon, scratch)
            else:
                self.linear(source, qkv, weight)
            self.rope_write_kv(inputs, qkv, layer, heads, table)
            return
        launch = self._launch(weight.rows // 2, source.rows, GATED, norm != 0, weight)
        kernel = self.kernels.get("linear_rope.cu", "linear_rope", **launch.macros, **kv_macros(layer))
        pointers = (source.pointer, weight.pointer, weight.bias, weight.scales, norm, qkv.pointer)
        places = (layer.keys, layer.values, table.pointer, inputs.rope_rows, inputs.slots)
        shape = (source.stride, qkv.stride, source.rows, weight.columns, heads, layer.kv_heads, layer.pages * PAGE_TOKENS)
        kernel(self.stream, (launch.blocks,), launch.warps * 32, (*pointers, *places, *shape, epsilon), launch.shared)

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
        outputs = weight.rows // 2 if epilogue == GATED else weight.rows
        launch = self._launch(outputs, source.rows, epilogue, norm != 0, weight)
        macros = {"EPILOGUE": epilogue, "OUTPUT": c_type(output.dtype), "ACTIVATION": ACTIVATIONS.index(activation)}
        kernel = self.kernels.get("linear_stream.cu", "linear_stream", **launch.macros, **macros)
        pointers = (source.pointer, weight.pointer, weight.bias, weight.scales, norm, output.pointer)
        shape = (source.stride, output.stride, source.rows, weight.rows, weight.columns)
        kernel(self.stream, (launch.blocks,), launch.warps * 32, (*pointers, *shape, add, epsilon), launch.shared)

    def _launch(self, outputs: int, rows: int, epilogue: int, has_norm: bool, weight: Weight) -> _Launch:
        """Choose how a streaming product runs."""
        few, processors = rows <= 8, self.kernels.multiprocessors
        tiles, warps = stream_tiles(outputs, few, epilogue, processors)
        blocks = -(-outputs // (TILE if epilogue == GATED else TILE * tiles))
        shared = stream_shared_bytes(warps, tiles, few, has_norm, weight.type)
        if shared > self.kernels.shared_limit:
            warps, shared = 8, stream_shared_bytes(8, tiles, few, has_norm, weight.type)
        macros: dict[str, int | str] = {"TOKENS": 8 if few else 16, "TILES": tiles, "WARPS": warps}
        macros |= {"NORM": int(has_norm), "WEIGHT": c_type(weight.type)}
        return _Launch(macros, min(blocks, processors * (16 // warps)), warps, shared)

    def _linear_plainly(self, source: Rows, output: Rows, weight: Weight, add: float) -> None:
        v = vector(weight.columns, source) if weight.pointer % 16 == 0 else 1
        kernel = self.kernels.get(
            "linear.cu",
            "linear",
            VECTOR=v,
            WEIGHT=c_type(weight.type),
            OUTPUT=c_type(output.dtype),
            **element_macros(source.dtype),
        )
        pointers = (source.pointer, weight.pointer, weight.bias, weight.scales, output.pointer)
        shape = (source.stride, output.stride, source.rows, weight.rows, weight.columns, weight.group or weight.columns)
        kernel(self.stream, (-(-weight.rows // WARPS), -(-source.rows // 4)), WARPS * 32, (*pointers, *shape, add))

    def _add_bias(self, output: Rows, bias: int, scale: float) -> None:
        v = vector(output.width, output) if bias % 16 == 0 else 1
        arguments = (output.pointer, bias, output.stride, output.width, scale)
        self._over_columns("elementwise.cu", "add_bias", output, output.width, v, arguments)


def can_stream(source: Rows, output: Rows, weight: Weight) -> bool:
    """Return whether the streaming kernel takes this product."""
    whole = 16 // ELEMENT_BYTES[weight.type]
    aligned = weight.columns % max(whole, 8) == 0 and source.stride % 8 == 0
    aligned = aligned and weight.pointer % 16 == 0 and source.pointer % 16 == 0
    types = source.dtype == "bf16" and weight.type in ("bf16", "e4m3") and output.dtype in ("bf16", "f32")
    one_scale = weight.type == "bf16" or weight.group in (0, weight.columns)
    return 0 < source.rows <= STREAM_ROWS and aligned and types and one_scale


def can_rotate(layer: KvLayer, table: RopeTable) -> bool:
    """Return whether rotation and storing may be fused to the product: whole heads, in halves, into types without scales."""
    whole = table.style == "half" and 2 * table.pairs == layer.head_dim and layer.head_dim % 32 == 0
    return whole and "e4m3" not in (layer.key_type, layer.value_type)


def stream_tiles(outputs: int, few: bool, epilogue: int, processors: int) -> tuple[int, int]:
    """Return the tiles that a block takes at a time, and its warps.

    Two tiles halve the reading of input rows, if blocks are enough without; where they are few, each has more warps.
    """
    tiles = 2 if epilogue == GATED or not few or outputs > 2 * processors * TILE else 1
    blocks = -(-outputs // (TILE if epilogue == GATED else TILE * tiles))
    return tiles, 16 if blocks <= processors else 8


def stream_shared_bytes(warps: int, tiles: int, few: bool, has_norm: bool, weight_type: str) -> int:
    """Return the bytes of the rings of input rows and of the sums, as in cuda/linear_stream.cu."""
    tokens, step = 8 if few else 16, 128 // ELEMENT_BYTES[weight_type]
    ring = (4 // tiles) * (tokens * step * 2 + (step * 4 if has_norm else 0))
    return warps * (ring + 2 * 4 * (tiles * TILE * (tokens + 1) + tokens))
