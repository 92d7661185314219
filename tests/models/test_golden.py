"""Every family against Hugging Face transformers, from safetensors and from GGUF: see README.md beside this file."""

from pathlib import Path

import pytest
from golden_table import TOLERANCE, Golden, differences, goldens

GOLDENS = list(goldens())


def test_there_are_goldens() -> None:
    # parametrization over an empty list would pass in silence
    assert len({golden.name.partition("/")[0] for golden in GOLDENS}) >= 44
    assert all(golden.expected.exists() for golden in GOLDENS)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_logits_and_greedy_text(golden: Golden, tmp_path: Path) -> None:
    largest, same = differences(golden, tmp_path)
    assert largest <= TOLERANCE
    assert same, "greedy decoding writes other tokens"
