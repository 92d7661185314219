"""How products by warp groups are divided among blocks: what was fastest on an H200, and what fits; no GPU is needed."""

from __future__ import annotations

import pytest

from infer.gpu import wide
from infer.gpu.many import many_tokens
from infer.gpu.warp_group import (
    MODEL_ROWS,
    MOST_SPLITS,
    NEIGHBOUR_BYTES,
    SHAPES,
    SHORT_SPAN,
    Division,
    Shape,
    divide,
    shared_bytes,
    stages_of,
)

CLUSTERS = tuple(132 // size for size in range(1, 9))
THIN, NARROW, MIDDLE, WIDE, BROAD, WIDEST = SHAPES
SHARED_LIMIT = 232448


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (6144, 4096, Division(THIN, 1)),
        (4096, 4096, Division(NARROW, 2)),
        (28672, 4096, Division(BROAD, 1)),
        (4096, 14336, Division(NARROW, 2)),
        (10240, 8192, Division(MIDDLE, 1)),
        (8192, 8192, Division(WIDE, 2)),
        (57344, 8192, Division(BROAD, 1)),
        (8192, 28672, Division(WIDE, 2)),
    ],
)
def test_weights_of_llama(rows: int, columns: int, expected: Division) -> None:
    assert divide(rows, columns, CLUSTERS) == expected


def test_without_clusters() -> None:
    assert divide(4096, 14336, (132, *[0] * 7)).splits == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [1, MOST_SPLITS])
@pytest.mark.parametrize("rows", [17, 64, 96, 128])
@pytest.mark.parametrize("kind", NEIGHBOUR_BYTES)
def test_shared_memory(shape: Shape, rows: int, splits: int, kind: str) -> None:
    tokens = many_tokens(rows)
    if splits > 1 and tokens > MODEL_ROWS:
        shape = shape._replace(span=SHORT_SPAN)
    stages = stages_of(shape, tokens, splits, SHARED_LIMIT, kind)
    assert stages >= 3
    assert shared_bytes(shape, tokens, splits, stages) + 4096 <= SHARED_LIMIT
    assert shape.threads <= 1024


@pytest.mark.parametrize(
    ("rows", "outputs", "steps", "expected"),
    [
        (256, 6144, 32, (2, 1)),
        (256, 4096, 32, (2, 2)),
        (256, 28672, 32, (1, 1)),
        (256, 4096, 112, (2, 2)),
        (192, 4096, 112, (1, 4)),
        (128, 8192, 224, (1, 2)),
        (256, 10240, 64, (1, 1)),
        (256, 57344, 64, (2, 1)),
        (192, 57344, 64, (1, 1)),
    ],
)
def test_many_rows(rows: int, outputs: int, steps: int, expected: tuple[int, int]) -> None:
    assert wide.divide(rows, outputs, steps, 132) == expected


@pytest.mark.parametrize("rows", range(wide.LEAST_WIDE, wide.MOST_WIDE + 1, 31))
@pytest.mark.parametrize("steps", [1, 5, 17, 112, 225])
def test_no_part_is_empty(rows: int, steps: int) -> None:
    token_blocks, splits = wide.divide(rows, 4096, steps, 132)
    assert (splits - 1) * -(-steps // splits) < steps
    assert (token_blocks - 1) * wide.tokens_of(rows, token_blocks) < rows <= token_blocks * wide.tokens_of(rows, token_blocks)
