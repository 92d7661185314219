"""Compile the kernels that models of usual shapes need, for a wheel that is to carry them: neither a GPU nor a driver is needed.

usage: prebuild_cuda.py [--architectures sm_90a ...] [--quantizations none fp8 ...] [--kv-cache-dtypes auto fp8] [FOLDER ...]

Each FOLDER has a `config.json`; without any, those of SHAPES are taken. Which kernels a model needs is found by running its
program with operations that launch nothing, for all numbers of rows that choose different kernels. What is written
(`python/infer/gpu/prebuilt/`) goes into the next wheel that is built; the loader prefers it, and compiles what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from compile_cuda import ARCHITECTURES, ROOT

from infer._core import DeviceModel, kernel_sources
from infer.gpu import linear, prebuilt, wide
from infer.gpu.attention import DECODE_ROWS
from infer.gpu.executor import FULL, GREEDY, SAMPLED, Launch
from infer.gpu.kernels import expand
from infer.gpu.launch import MAP_BYTES, signatures
from infer.gpu.memory import Plan
from infer.gpu.operations import Operations
from infer.gpu.worker import _Loaded

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "llama 1B": (LLAMA, (2048, 32, 8, 8192, 64, True)),
    "llama 8B": (LLAMA, (4096, 32, 8, 14336, 128, False)),
    "llama 70B": (LLAMA, (8192, 64, 8, 28672, 128, False)),
    "qwen3 8B": (
        {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936},
        (4096, 32, 8, 12288, 128, False),
    ),
}
"""Further configuration, and hidden width, heads, key/value heads, inner width, width of a head, tied head."""

CARDS = {
    "sm_80": (108, 166912),
    "sm_86": (84, 101376),
    "sm_89": (142, 101376),
    "sm_90a": (132, 232448),
    "sm_100a": (148, 232448),
    "sm_120a": (170, 101376),
}
"""Multiprocessors of the usual card of an architecture, and the shared memory that a block may have, bytes."""

ROWS = (1, 2, 3, 4, 8, 13, 16, 24, 32, 40, 64, 96, 128, 160, 192, 224, 256, 512, 2048)
"""Numbers of rows between which different kernels are chosen."""

Variant = tuple[str, tuple[str, ...]]


@cache
def parameters(file: str) -> dict[str, str]:
    """Return the types of the parameters of a file's kernels."""
    return signatures(expand(kernel_sources(), file))


class NoKernel:
    """In the place of a kernel, whose parameters have these types (launch.py)."""

    registers = 80

    def __init__(self, multiprocessors: int, name: str, codes: str) -> None:
        self._multiprocessors, self._name, self._codes = multiprocessors, name, codes

    def __call__(
        self,
        stream: int,
        grid: tuple[int, ...],
        threads: int,
        arguments: tuple[int | float | bytes, ...],
        *more: int,
        cooperative: bool = False,
    ) -> None:
        """Launch nothing, but see that the arguments are the kernel's."""
        pairs = zip(arguments, self._codes, strict=False)
        if len(arguments) != len(self._codes) or any(isinstance(one, float) and code != "f" for one, code in pairs):
            raise TypeError(f"{self._name} takes {self._codes}, not {arguments}")

    def most_clusters(self, cluster: int, threads: int, shared: int) -> int:
        """Return how many clusters of blocks of the greatest size run at once, if none is left over."""
        return self._multiprocessors // cluster


class Recorder:
    """In the place of `Kernels`: launches nothing, and remembers what would have been compiled."""

    def __init__(self, architecture: str) -> None:
        self.capability = int(architecture[3:].rstrip("a"))
        self.multiprocessors, self.shared_limit = CARDS[architecture]
        self.variants: set[Variant] = set()

    def get(self, file: str, name: str, carveout: int = 100, /, **macros: int | str) -> NoKernel:
        """Remember a kernel."""
        self.variants.add((file, tuple(f"-D{macro}={value}" for macro, value in sorted(macros.items()))))
        return NoKernel(self.multiprocessors, name, parameters(file)[name])


class NoBlas:
    """In the place of cuBLASLt, which has no kernels of ours."""

    def __init__(self, *arguments: Any) -> None: ...

    def has_scaled(self, *arguments: Any) -> bool:
        """As on Hopper."""
        return True

    def product(self, *arguments: Any, **more: Any) -> None:
        """Do nothing."""


class NoDevice:
    """Addresses that nobody uses."""

    stream = 0

    def __init__(self) -> None:
        self._end = 1 << 20

    def allocate(self, size: int) -> int:
        """Return another address."""
        self._end += -(-size // 256) * 256
        return self._end

    def free_bytes(self) -> int:
        """Return more than any model takes."""
        return 1 << 48

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return zeros, which take memory where they are written only."""
        return np.zeros(shape, dtype)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def variants(folder: Path, architecture: str, quantization: str | None, kv_type: str) -> set[Variant]:
    """Return the kernels that a model's configuration needs."""
    no_map = mock.patch.object(wide, "tensor_map", lambda *_: bytes(MAP_BYTES))  # the driver makes them
    with mock.patch.object(linear, "Blas", NoBlas), no_map:
        return _variants(folder, architecture, quantization, kv_type)


def _variants(folder: Path, architecture: str, quantization: str | None, kv_type: str) -> set[Variant]:
    recorder, device = Recorder(architecture), NoDevice()
    operations = Operations(recorder, 0, 1 << 20, 288 << 20)  # type: ignore[arg-type]
    rounded = quantization == "fp8"
    options: dict[str, Any] = {"kv_cache_dtype": kv_type, "load_format": "dummy"}
    model = DeviceModel(folder, backend="prebuild", quantization=None if rounded else quantization, **options)
    settings = {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 2048, "speculation": None}
    loaded = _Loaded(device, operations, model, settings, rounded, False)  # type: ignore[arg-type]
    executor = loaded.executor
    executor.allocate_pages(1024, 4096)
    plan = Plan(device, loaded.rows, loaded.sequences, 256, 4096, executor.choices)  # type: ignore[arg-type]
    for rows in ROWS:
        for decodes in (True, False):
            wanted = rows if decodes and rows <= 512 else min(rows, DECODE_ROWS)
            inputs = plan.inputs(rows, min(rows, 256))
            executor.forward(Launch(inputs, rows, wanted, plan.logit_rows(rows), plan.draws, GREEDY, decodes))
            if executor.screens(wanted):
                known = (plan.logit_rows(rows), plan.draws, GREEDY, decodes)
                executor.choose(Launch(inputs, rows, wanted, *known, is_screened=True))
    for kind in (GREEDY, SAMPLED, FULL):
        executor.choose(Launch(plan.inputs(1, 1), 1, 1, plan.logit_rows(1), plan.draws, kind, True))
    return recorder.variants


def compile_one(job: tuple[str, str, tuple[str, ...]]) -> tuple[str, bytes]:
    """Compile a variant for an architecture: its digest, and the machine code."""
    from cuda.bindings import nvrtc

    architecture, file, defines = job
    source = expand(kernel_sources(), file)
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), 0, [], [])
    options = [f"--gpu-architecture={architecture}", *defines, "--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{file} {' '.join(options)}: {log.decode(errors='replace')}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return prebuilt.digest(source, defines, architecture), code


def write_shapes(folder: Path) -> list[Path]:
    """Write the configurations of SHAPES."""
    folders = []
    for name, (more, (hidden, heads, kv_heads, inner, head_dim, tied)) in SHAPES.items():
        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner}
        rest = {"head_dim": head_dim, "tie_word_embeddings": tied, "num_hidden_layers": 1, "max_position_embeddings": 4096}
        folders.append(folder / name.replace(" ", "-"))
        folders[-1].mkdir()
        text = json.dumps({**more, **sizes, **rest, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2})
        (folders[-1] / "config.json").write_text(text, encoding="utf-8")
    return folders


def main() -> int:
    """Find, compile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["sm_90a"], choices=ARCHITECTURES)
    parser.add_argument("--quantizations", nargs="+", default=["none", "fp8", "int4", "int8"])
    parser.add_argument("--kv-cache-dtypes", nargs="+", default=["auto", "fp8"])
    parser.add_argument("--output", type=Path, default=ROOT / "python" / "infer" / "gpu" / "prebuilt")
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Pool() as pool:
        folders = options.folders or write_shapes(Path(scratch))
        for architecture in options.architectures:
            found: set[Variant] = set()
            for folder in folders:
                for name in options.quantizations:
                    for kind in options.kv_cache_dtypes:
                        found |= variants(folder, architecture, None if name == "none" else name, kind)
            jobs = [(architecture, file, defines) for file, defines in sorted(found)]
            path = prebuilt.write(architecture, dict(pool.map(compile_one, jobs)), options.output)
            print(f"{path}: {len(jobs)} variants, {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
