"""Choosing among cuBLASLt's algorithms, and keeping the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from device import device, error, rounded
from test_rows import normal

from infer.gpu import blas as blas_module
from infer.gpu.blas import Blas

if TYPE_CHECKING:
    from pathlib import Path


def product(blas: Blas, gpu: Any) -> float:
    """The error of a product of 64 rows."""
    x, w = normal(64, 2048), normal(512, 2048) / 8
    source, output, weight = gpu.rows(x, "bf16"), gpu.blank(64, 512, "f32"), gpu.weight(w, "bf16")
    blas.product(gpu.stream.ptr, source, weight, output)
    return error(gpu.read(output), rounded(x, "bf16") @ rounded(w, "bf16").T)


def test_choices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device()
    monkeypatch.setenv("INFER_KERNEL_CACHE", str(tmp_path))
    memory, space = gpu.zeros(32 << 20), (gpu.zeros(16 << 20), 16 << 20)
    calls = []
    real = blas_module.fastest

    def fastest(*arguments: Any) -> int:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(blas_module, "fastest", fastest)
    monkeypatch.setattr(blas_module, "LEAST_TIMED", 0)
    first = Blas(memory, 32 << 20, space)
    assert product(first, gpu) < 2e-5
    assert product(first, gpu) < 2e-5
    assert len(calls) == 1
    assert product(Blas(memory, 32 << 20, space), gpu) < 2e-5  # as another process would
    assert len(calls) == 1
    (path,) = tmp_path.glob("products-*.json")
    for damaged in ("{", "[1]", path.read_text(encoding="utf-8").replace("\n", "0\n", 3)):
        path.write_text(damaged, encoding="utf-8")
        assert product(Blas(memory, 32 << 20, space), gpu) < 2e-5
    assert product(Blas(memory, 32 << 20, None), gpu) < 2e-5
    assert len(calls) >= 3


def test_nothing_is_timed_while_a_stream_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device()
    monkeypatch.setenv("INFER_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(blas_module, "fastest", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(blas_module, "LEAST_TIMED", 0)
    blas = Blas(gpu.zeros(32 << 20), 32 << 20, (gpu.zeros(16 << 20), 16 << 20))
    x, w = normal(64, 2048), normal(512, 2048) / 8
    source, output, weight = gpu.rows(x, "bf16"), gpu.blank(64, 512, "f32"), gpu.weight(w, "bf16")
    gpu.stream.synchronize()
    with gpu.stream:
        gpu.stream.begin_capture()
        blas.product(gpu.stream.ptr, source, weight, output)
        graph = gpu.stream.end_capture()
        graph.launch(gpu.stream)
    assert error(gpu.read(output), rounded(x, "bf16") @ rounded(w, "bf16").T) < 2e-5
    assert np.isfinite(gpu.read(output)).all()
