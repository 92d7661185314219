"""How products by warp groups are divided among blocks: what was fastest on an H200, and what fits; no GPU is needed."""

from __future__ import annotations

import pytest

from infer.gpu.many import many_tokens
from infer.gpu.warp_group import MODEL_ROWS, MOST_SPLITS, SHAPES, SHORT_SPAN, Division, Shape, divide, shared_bytes, stages_of

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
def test_shared_memory(shape: Shape, rows: int, splits: int) -> None:
    tokens = many_tokens(rows)
    if splits > 1 and tokens > MODEL_ROWS:
        shape = shape._replace(span=SHORT_SPAN)
    stages = stages_of(shape, tokens, splits, SHARED_LIMIT)
    assert stages >= 3
    assert shared_bytes(shape, tokens, splits, stages) + 4096 <= SHARED_LIMIT
    assert shape.threads <= 1024
