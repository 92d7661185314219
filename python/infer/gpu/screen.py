"""The screened head: greedy decoding that reads a copy of the head in 8 bits, and of the head itself only what may matter.

cuda/screen.cu says how, and why the token is the one that the whole head gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from infer.gpu.arrays import BLOCK_COLUMNS, Rows, Weight
from infer.gpu.linear import LinearOperations, StreamLaunch, can_stream
from infer.gpu.many import ALIGNED, STORE, ceil_of, many_tokens
from infer.gpu.packing import Packed, PackOperations, Plan, sizes
from infer.gpu.stream import STREAM_WARPS

if TYPE_CHECKING:
    from infer.gpu.device import Device

ROUGH = Plan(Packed("int8", BLOCK_COLUMNS, False, 0, 0, 0), "bf16")
"""How the copy is made: a scale for each block of columns, that is 1.6 % more than the integers alone."""

LEAST_ROWS = 32768
"""Fewest tokens of a vocabulary for which this pays."""
FEW_ROWS = 8
"""Most rows that screen_rough multiplies; those of more are multiplied by screen_many."""
MOST_ROWS, CAPABILITY = 64, 90
"""Most rows of a step for which this pays, and the compute capability that has the instructions for more than FEW_ROWS."""
MOST_SHARE = 8
"""With more candidates in all rows, on average, than one in so many of the head's rows, it does not."""
MEMORY_SHARE = 16
"""The copy may take one in so many of the bytes that are free."""

FOUND_BYTES = 40
"""Of a row: `Found` in cuda/screen.cu."""
COUNTED, TIMES = 1, 2
"""Which 64-bit numbers of them tell how many tokens were ever computed with the head itself, and in how many launches."""
ROUGH_UNITS = 4
"""`UNITS` in cuda/screen_rough.cu."""
MEASURED_BYTES = 512
"""Of shared memory there, beside sums, rings and rows."""
SCREENERS = 256
SCREEN_PIECE = 1024  # tokens that a block looks at, at least
SCREEN_BLOCKS = 8  # for each multiprocessor
LEAST_PARTS = 8
SEGMENT, MOST_SEGMENTS = 16, 2048
"""Tokens whose greatest logit screen_many leaves, and how many such a block of screen_exact_many looks at, at most."""
MANY_BLOCKS = 4  # of screen_exact_many, for each multiprocessor
MANY_THREADS, UNIT_ROWS = 384, 256  # of a block of screen_many, and rows of the head that it multiplies at a time
SCALE_BYTES = 512  # of a stage
STATIC_BYTES = 4096  # of shared memory, that it declares itself, at most
MOST_STAGES = 5
MEASURED_ROW = 16  # bytes of `Measured` in cuda/screen_many.cu


class Screen(NamedTuple):
    """A head with its copy, and what else is on the device."""

    head: Weight
    rough: Weight
    bounds: int
    """f32 (2, rows of the head): by how much logits of the copy may be wrong, for each row's length, and for its error's."""
    found: int
    """(MOST_ROWS) of FOUND_BYTES: zero before the first launch."""
    normed: Rows
    """(MOST_ROWS, columns of the head): rows as they are multiplied, behind a norm. The program's own place for them may be that
    of the rows that come in, which blocks of screen_rough read while one of them writes these."""


class Normed(NamedTuple):
    """A root-mean-square norm before the head."""

    weight: int
    epsilon: float


class ScreenOperations(LinearOperations, PackOperations):
    """Screened heads, enqueued on one stream."""

    def can_screen(self, head: Weight) -> bool:
        """Return whether there may be a screen before a head."""
        known = head.type == "bf16" and not head.bias and head.experts == 1
        return known and head.rows >= LEAST_ROWS and head.rows % 4 == 0 and head.columns % BLOCK_COLUMNS == 0

    def make_screen(self, screen: Screen, refused: int) -> None:
        """Enqueue the making of the copy and of bounds. ``refused`` is as for `pack`, but matters not."""
        head, rough = screen.head, screen.rough
        self.pack(head.pointer, rough, ROUGH, head.rows, refused)
        kernel = self.kernels.get("screen.cu", "screen_bounds", **rough.macros)
        arguments = (head.pointer, rough.pointer, rough.scales, screen.bounds, head.rows, head.columns)
        kernel(self.stream, (-(-head.rows // (SCREENERS // 32)),), SCREENERS, arguments)

    def screens(self, source: Rows, logits: Rows, screen: Screen, norm: Normed | None) -> bool:
        """Return whether `choose_screened` takes so many rows."""
        aligned = logits.pointer % 16 == 0 and logits.stride % 4 == 0 and logits.width == screen.head.rows
        inputs = [source] if norm is None else [source, screen.normed.first(source.rows)]
        if not (0 < source.rows <= MOST_ROWS and aligned):
            return False
        if source.rows > FEW_ROWS:
            aligned = all(rows.pointer % 16 == 0 and rows.stride % 8 == 0 and rows.dtype == "bf16" for rows in inputs)
            fits = self._many_places(source, screen)[-1] <= self._space_bytes
            return aligned and fits and self.kernels.capability == CAPABILITY
        can = all(can_stream(rows, logits, screen.rough) for rows in inputs)
        return can and self._launch_rough(source.rows, screen.rough, False).is_resident

    def choose_screened(self, source: Rows, logits: Rows, screen: Screen, norm: Normed | None, chosen: int) -> None:
        """``chosen[row]`` as by `argmax` of ``norm(source) * head^T``; ``logits`` is working memory."""
        head, rough = screen.head, screen.rough
        if norm is not None and not (self._can_stream(source, logits, head) and self._can_normalise(source, head, STORE)):
            normed = screen.normed.first(source.rows)
            self.norm(source, normed, "rms", norm.epsilon, norm.weight)
            source, norm = normed, None
        normed, blocks = screen.normed if norm is not None else source, self.kernels.multiprocessors
        if source.rows <= FEW_ROWS:
            self._rough(source, logits, screen, norm)
            parts = min(max(LEAST_PARTS, SCREEN_BLOCKS * blocks // source.rows), ceil_of(logits.width, SCREEN_PIECE))
            name, known = "screen_exact", screen.bounds
        else:
            known = self._rough_many(source, logits, screen)
            parts = max(ceil_of(ceil_of(logits.width, SEGMENT), MOST_SEGMENTS), MANY_BLOCKS * blocks // source.rows)
            name = "screen_exact_many"
        kernel = self.kernels.get("screen.cu", name, **rough.macros)
        places = (logits.pointer, known, head.pointer, normed.pointer, screen.found, chosen)
        shape = (logits.stride, logits.width, normed.stride, head.columns)
        kernel(self.stream, (parts, source.rows), SCREENERS, (*places, *shape))

    def _rough(self, source: Rows, logits: Rows, screen: Screen, norm: Normed | None) -> None:
        """Approximate logits of few rows, and what is found with them."""
        rough = screen.rough
        weight, epsilon = norm if norm is not None else (0, 0.0)
        normed = screen.normed
        launch = self._launch_rough(source.rows, rough, norm is not None)
        kernel = self.kernels.get("screen_rough.cu", "screen_rough", **launch.macros)
        weights = (rough.pointer, rough.scales, screen.bounds, weight)
        shape = (source.stride, normed.stride, logits.stride, source.rows, rough.rows, rough.columns)
        arguments = (source.pointer, *weights, normed.pointer, screen.found, logits.pointer, *shape, epsilon)
        self._launch_stream(kernel, launch, arguments)

    def _rough_many(self, source: Rows, logits: Rows, screen: Screen) -> int:
        """What logits of more rows are at most, and what is found with that; returns where the greatest of segments are."""
        rough, tokens = screen.rough, many_tokens(source.rows)
        stage = (UNIT_ROWS + 2 * tokens) * BLOCK_COLUMNS + SCALE_BYTES
        stages = min(MOST_STAGES, (self.kernels.shared_limit - STATIC_BYTES - ALIGNED) // stage)
        macros = {**rough.macros, "TOKENS": tokens, "STAGES": stages}
        digits, measured, greatest, _ = self._many_places(source, screen)
        kernel = self.kernels.get("screen_many.cu", "screen_digits", **macros)
        places = (source.pointer, self._space + digits, self._space + measured, screen.found)
        kernel(self.stream, (tokens,), SCREENERS, (*places, source.stride, source.rows, source.width))
        kernel = self.kernels.get("screen_many.cu", "screen_many", **macros)
        weights = (rough.pointer, rough.scales, screen.bounds)
        outputs = (logits.pointer, self._space + greatest, screen.found)
        shape = (logits.stride, source.rows, rough.rows, rough.columns)
        arguments = (self._space + digits, self._space + measured, *weights, *outputs, *shape)
        blocks = min(self.kernels.multiprocessors, ceil_of(rough.rows, SEGMENT))
        kernel(self.stream, (blocks,), MANY_THREADS, arguments, ALIGNED + stages * stage)
        return self._space + greatest

    def _many_places(self, source: Rows, screen: Screen) -> tuple[int, int, int, int]:
        """Return where in the space rows' digits are, what is known of rows, the greatest of segments, and the end."""
        tokens = many_tokens(source.rows)
        measured = 2 * tokens * screen.head.columns
        greatest = measured + tokens * MEASURED_ROW
        return 0, measured, greatest, greatest + source.rows * ceil_of(screen.head.rows, SEGMENT) * 4

    def _launch_rough(self, rows: int, rough: Weight, has_norm: bool) -> StreamLaunch:
        """Choose how the product with the copy runs: as a streaming product, but with more sums."""
        counted = next(count for count in (1, 2, 4, 8) if rows <= count)
        more = 2 * (ROUGH_UNITS - 1) * STREAM_WARPS * 16 * (counted | 1) * 4 + MEASURED_BYTES
        return self._launch(rows, STORE, has_norm, rough, more)


class Watch:
    """Sees now and then whether a screen pays, and waits for nothing."""

    def __init__(self, device: Device, screen: Screen) -> None:
        self._device, self._screen = device, screen
        self._seen = device.pinned((MOST_ROWS, FOUND_BYTES // 8), "uint64")
        self._seen[:] = 0

    def look(self) -> None:
        """Enqueue a copy of the counts."""
        self._device.download(self._seen, self._screen.found)

    def pays(self, rows: int) -> bool:
        """Return whether few enough tokens were candidates, as far as the host knows, for steps of so many rows."""
        counted, times = self._seen[:, [COUNTED, TIMES]].sum(0).tolist()
        return bool(counted * rows * MOST_SHARE <= times * self._screen.head.rows)


def screen_of(device: Device, operations: Any, head: Weight) -> Screen | None:
    """Make a screen before a head, if there may be one and memory is ample."""
    if not operations.can_screen(head):
        return None
    packed = sizes(head.rows, head.columns, ROUGH.packed)[:2]
    sizes_of = (*packed, 8 * head.rows, MOST_ROWS * FOUND_BYTES, 4, 2 * MOST_ROWS * head.columns)
    if sum(sizes_of) > device.free_bytes() // MEMORY_SHARE:
        return None
    values, scales, bounds, found, refused, rows = map(device.allocate, sizes_of)
    device.clear(found, MOST_ROWS * FOUND_BYTES)
    rough = Weight(values, head.rows, head.columns, ROUGH.packed.type, scales=scales, group=ROUGH.packed.group)
    screen = Screen(head, rough, bounds, found, Rows(rows, MOST_ROWS, head.columns, head.columns, head.type))
    operations.make_screen(screen, refused)
    return screen
