"""What `import infer` may cost and what it gives."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

import infer

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

IMPORT = """
import os, sys
import infer
print(len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1)
print([name for name in ("numpy", "typer", "rich", "huggingface_hub", "tqdm", "asyncio") if name in sys.modules])
"""


def test_import_starts_no_thread_and_loads_nothing_heavy(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(IMPORT)
    threads, heavy = done.stdout.splitlines()
    assert int(threads) == 1
    assert heavy == "[]"


def test_public_names_exist_and_are_documented() -> None:
    for name in infer.__all__:
        assert hasattr(infer, name), name
        if name != "__version__":
            assert (getattr(infer, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_there_is_one_version() -> None:
    assert infer.__version__ == importlib.metadata.version("infer")


def test_every_method_of_llm_is_documented() -> None:
    for name in dir(infer.LLM):
        if not name.startswith("_"):
            assert (getattr(infer.LLM, name).__doc__ or "").strip(), name
