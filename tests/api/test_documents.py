"""README's and the examples' programs run as they stand."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import infer.info
import infer.llm

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_readme_programs(number: int, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(PROGRAMS[number])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:  # type: ignore[no-untyped-def]
    done = run_python(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_is_something_to_run() -> None:
    assert PROGRAMS
    assert EXAMPLES


@pytest.mark.parametrize("module", [infer.llm, infer.info], ids=lambda module: module.__name__)
def test_docstring_examples(module) -> None:  # type: ignore[no-untyped-def]
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)
