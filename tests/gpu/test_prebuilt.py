"""Kernels that a wheel carries: what is found for a model, written, and preferred by the loader; no GPU is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from infer._core import kernel_sources
from infer.gpu import kernels, prebuilt
from infer.gpu.kernels import Kernels, expand

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tools/prebuild_cuda.py` as a module, where the compiler's package is installed."""
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.syspath_prepend(str(TOOLS))
    import prebuild_cuda

    yield prebuild_cuda
    for name in ("prebuild_cuda", "compile_cuda"):
        sys.modules.pop(name, None)


def test_archives_hold_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    code = {
        prebuilt.digest("source", ["-DA=1"], "sm_90a"): b"\x7fELF one",
        prebuilt.digest("source", [], "sm_90a"): b"\x7fELF two",
    }
    path = prebuilt.write("sm_90a", code, tmp_path)
    first = path.read_bytes()
    assert {name: prebuilt.read("sm_90a", name, tmp_path) for name in code} == code
    assert prebuilt.read("sm_90a", prebuilt.digest("other", [], "sm_90a"), tmp_path) is None
    assert prebuilt.read("sm_80", next(iter(code)), tmp_path) is None
    prebuilt.write("sm_90a", code, tmp_path)
    assert path.read_bytes() == first, "the same kernels make the same file"
    path.write_bytes(first[:40])
    assert prebuilt.read("sm_90a", next(iter(code)), tmp_path) is None, "a damaged archive is as none"


class Driver:
    """Loads modules that it accepts, and has every function."""

    def __init__(self, accepts: bytes) -> None:
        self.accepts, self.offered = accepts, []

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:  # noqa: N802
        self.offered.append(code)
        return 0 if code == self.accepts else 1


@pytest.mark.parametrize("accepts", [b"prebuilt", b"compiled"])
def test_the_loader_prefers_them(accepts: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And compiles where there are none, or where the driver refuses them."""
    driver, compiled = Driver(accepts), []
    loader = object.__new__(Kernels)
    loader.architecture, loader._folder, loader._prebuilt = "sm_90a", tmp_path / "cache", tmp_path / "prebuilt"
    monkeypatch.setattr(loader, "_digest", lambda source, defines: "name", raising=False)
    monkeypatch.setattr(kernels, "driver", lambda: driver)
    monkeypatch.setattr(kernels, "compile_source", lambda *arguments: compiled.append(arguments) or b"compiled")
    prebuilt.write("sm_90a", {prebuilt.digest("text", ("-DA=1",), "sm_90a"): b"prebuilt"}, tmp_path / "prebuilt")
    loader._load("x.cu", "text", ("-DA=1",))
    if accepts == b"prebuilt":
        assert driver.offered == [b"prebuilt"]
        assert not compiled
        assert not (tmp_path / "cache").exists()
        return
    assert driver.offered == [b"prebuilt", b"compiled"]
    assert len(compiled) == 1
    driver.offered.clear()
    loader._load("x.cu", "text", ("-DA=1",))
    assert driver.offered == [b"prebuilt", b"compiled"], "from the cache on disk"
    assert len(compiled) == 1


def test_the_kernels_of_a_model_are_found_and_compiled(tool: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512, "head_dim": 64}
    text = json.dumps({**tool.LLAMA, **sizes, "num_hidden_layers": 1, "max_position_embeddings": 512, "vocab_size": 512})
    (folder / "config.json").write_text(text, encoding="utf-8")
    plain, rounded = (tool.variants(folder, "sm_90a", name, "auto") for name in (None, "fp8"))
    files = {file for file, _ in plain}
    assert {"linear_stream.cu", "linear_rope.cu", "attention_decode.cu", "attention_warp_group.cu", "sampler.cu"} <= files
    assert any("-DWEIGHT=e4m3" in defines for _, defines in rounded - plain)
    assert "attention_prefill.cu" in {file for file, _ in tool.variants(folder, "sm_80", None, "auto")}
    file, defines = min(plain)
    name, code = tool.compile_one(("sm_90a", file, defines))
    assert name == prebuilt.digest(expand(kernel_sources(), file), defines, "sm_90a")
    assert code[:4] == b"\x7fELF"
