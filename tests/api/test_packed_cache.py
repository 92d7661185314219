"""Packed weights on disk: `LLM(packed_cache_dir=)`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from float_folder import float_folder

from infer import LLM, InferError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TEXT = "Once upon a time there was a king who had three daughters"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16-bit floats."""
    return float_folder(tmp_path_factory.mktemp("packed") / "source")


def computed(source: Path, folder: Path | None) -> tuple[NDArray[np.float32], str]:
    """What a rounded model computes, and what came of its folder."""
    with LLM(source, quantization="int4", threads=2, max_num_seqs=1, packed_cache_dir=folder) as llm:
        return llm.logits(TEXT), llm._engine.packed_cache[0]


def test_the_second_load_reads_what_the_first_one_packed(source: Path, tmp_path: Path) -> None:
    """Bit for bit the same, in a folder that only its owner reads."""
    expected, found = computed(source, None)
    assert found == "off"
    for outcome in ("written", "read"):
        logits, found = computed(source, tmp_path / "cache")
        assert found == outcome
        assert np.array_equal(logits, expected)
    if os.name == "posix":
        (file,) = (tmp_path / "cache").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600


def test_damage_is_told_and_mended(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that was cut short neither ends the process nor changes what is computed."""
    expected, _ = computed(source, tmp_path)
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, logger="infer"):
        logits, found = computed(source, tmp_path)
    assert found == "written"
    assert np.array_equal(logits, expected)
    (record,) = [record for record in caplog.records if record.name == "infer"]
    assert "packed_cache_dir" in record.getMessage()
    assert "cut short" in record.getMessage()
    assert computed(source, tmp_path)[1] == "read"


def test_processes_that_write_at_once_leave_one_whole_file(source: Path, tmp_path: Path) -> None:
    """The last one wins; nobody reads half of anything."""
    program = (
        "import sys; from infer import LLM\n"
        "llm = LLM(sys.argv[1], quantization='int4', threads=1, packed_cache_dir=sys.argv[2]); print(llm._engine.packed_cache)"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert "None" in output, "no warning"
    assert len(list(tmp_path.iterdir())) == 1
    assert computed(source, tmp_path)[1] == "read"


def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    """Loading goes on without it; what is no path is refused."""
    file = tmp_path / "file"
    file.write_text("no folder")
    expected, _ = computed(source, None)
    logits, found = computed(source, file / "below")
    assert found == "failed"
    assert np.array_equal(logits, expected)
    with pytest.raises(InferError, match="packed_cache_dir must be None or a path"):
        LLM(source, packed_cache_dir=3)  # type: ignore[arg-type]
    with pytest.raises(InferError, match="packed_cache_dir must be None or a path, got an empty one"):
        LLM(source, packed_cache_dir="")
