"""What tests of the GPU path share: LLMs on the numpy twin of a GPU, and on a real one where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from numpy_executor import HostDevice

from infer import LLM, InferError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The device that the next `LLM(device="cuda")` gets."""
    device = HostDevice()
    monkeypatch.setattr("infer.gpu.device.Device", lambda: device)
    return device


@pytest.fixture
def open_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    """Open LLMs on devices of their own in this process's memory; all are closed in the end."""
    monkeypatch.setattr("infer.gpu.device.Device", HostDevice)
    opened: list[LLM] = []

    def start(model: Any = None, **options: Any) -> LLM:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "dtype": "float32", "device": "cuda"}
        opened.append(LLM(model, **{**sizes, **options}))
        return opened[-1]

    yield start
    for llm in opened:
        llm.close()


@pytest.fixture(scope="session")
def gpu() -> None:
    """Skip where there is no GPU that the package can use."""
    from infer.gpu.device import require

    try:
        require()
    except InferError as error:
        pytest.skip(str(error))
