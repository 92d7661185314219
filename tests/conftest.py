"""Fixtures that every room of tests shares. Models come from the repository alone: nothing is downloaded, no folder is needed
beside the clone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infer import LLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A shell's background job ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# numpy is an oracle here, of matrices too small for more than one thread; several of them wait for each other on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The bundled model, loaded once for all tests that do not change how it is loaded."""
    with LLM(threads=2, max_num_seqs=16, seed=0) as llm:
        yield llm


@pytest.fixture(scope="session")
def bare_folder() -> Path:
    """A model folder without tokenizer files (random weights)."""
    return ROOT / "tests" / "models" / "golden" / "llama"


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a fresh interpreter; what it prints comes back."""

    def run(program: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *arguments],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def infer_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command `infer` as a user would."""

    def run(*arguments: str, stdin: str | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infer", *arguments],
            input=stdin,
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def clean_environment() -> dict[str, str]:
    """Return the environment without what would change widths, colours or the hub."""
    dropped = ("COLUMNS", "LINES", "FORCE_COLOR", "CLICOLOR_FORCE", "HF_ENDPOINT")
    return {**{key: value for key, value in os.environ.items() if key not in dropped}, "NO_COLOR": "1", "TERM": "dumb"}
