"""Compile every kernel in cuda/ for every GPU generation, through NVRTC: neither a GPU nor a driver is needed.

usage: compile_cuda.py [--write] [FILE.cu ...]      (default: all of cuda/*.cu)

What the compiler says of registers, spills and shared memory is compared with cuda/report.json: a kernel that begins to spill,
or takes notably more registers than it did, fails. --write keeps the new figures instead.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import product
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "cuda" / "report.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
LOCAL_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
MORE_REGISTERS = 16  # that a kernel may take, beyond its figure in the report
MORE_SPILLS = 64  # bytes, for a kernel that spills in the report already

Macros = dict[str, Any]


def choices(**lists: list[Any]) -> list[Macros]:
    """Return every combination of macros' values; None leaves a macro undefined."""
    combinations = product(*lists.values())
    return [{key: value for key, value in zip(lists, values, strict=True) if value is not None} for values in combinations]


BOTH = {"INFER_F32": [None, 1], "VECTOR": [1, 8]}
ONE: list[Macros] = [{}]
HEADS: list[Macros] = [
    {"GROUP": 4, "HEAD_DIM": 128},
    {"GROUP": 4, "HEAD_DIM": 64},
    {"GROUP": 1, "HEAD_DIM": 96, "SOFTCAP": 1},
    {"GROUP": 8, "HEAD_DIM": 128, "KEY_TYPE": "e4m3", "VALUE_TYPE": "e4m3"},
    {"GROUP": 4, "HEAD_DIM": 128, "KEY_TYPE": "i8", "VALUE_TYPE": "i8"},
    {"GROUP": 16, "HEAD_DIM": 128, "DECODE_WARPS": 4},
    {"GROUP": 4, "HEAD_DIM": 256, "DECODE_WARPS": 4},
]
KINDS = {"KEY_TYPE": ["bf16", "float", "e4m3", "i8"], "VALUE_TYPE": ["bf16", "e4m3", "i8"]}
FEW: Macros = {"TOKENS": [8], "DEPTH": [5]}
MORE: Macros = {"TOKENS": [16], "DEPTH": [2]}
ANY: Macros = {"TOKENS": [1, 8, 16], "DEPTH": [5]}
GROUPED: Macros = {"WEIGHT": ["bf16", "e4m3"]}
STREAMED = [{**few, "RESIDENT": [0, 1], "WEIGHT": ["bf16", "e4m3"]} for few in (FEW, MORE)]
NORMED = {"RESIDENT": [1], "NORM": [1]}
PACKED = [
    *({"WEIGHT": "u8", "PACKED": bits, "WEIGHT_GROUP": group} for bits, group in ((4, 32), (4, 128), (8, 32))),
    {"WEIGHT": "u8", "PACKED": 4, "MINIMA": 1},
    {"WEIGHT": "u8", "PACKED": 4, "MINIMA": 1, "STEPS": 1},
    {"WEIGHT": "u8", "PACKED": 8, "MINIMA": 1, "STEPS": 1},
    {"WEIGHT": "u8", "PACKED": 8, "STEPS": 1, "HALVES": 1},
]
"""Layouts of packed weights."""
SCREENED: Macros = {"WEIGHT": "u8", "PACKED": 8, "WEIGHT_GROUP": 128}


def packed(variants: list[Macros], bits: int = 0) -> list[Macros]:
    """Return variants for each packed layout, of so many bits if told."""
    return [{**layout, **macros} for layout in PACKED if bits in (0, layout["PACKED"]) for macros in variants]


VARIANTS: dict[str, list[Macros]] = {
    "activation.cu": choices(**BOTH, ACTIVATION=[0, 2])
    + choices(INFER_F32=[None, 1], VECTOR=[8], VECTORS=[4])
    + choices(VECTOR=[8], VECTORS=[4], AHEAD=[1]),
    "attention.cu": choices(INFER_F32=[None, 1], **KINDS),
    "attention_decode.cu": HEADS + choices(GROUP=[4, 8], HEAD_DIM=[128], ROTATES=[1]),
    "attention_plan.cu": ONE,
    "attention_prefill.cu": HEADS,
    "attention_warp_group.cu": [*choices(GROUP=[4], HEAD_DIM=[64, 128, 256]), {"GROUP": 3, "HEAD_DIM": 96, "SOFTCAP": 1}],
    "elementwise.cu": choices(**BOTH),
    "experts.cu": choices(**BOTH, WEIGHT=["bf16", "float", "e4m3"]) + packed(choices(VECTOR=[8])),
    "experts_grouped.cu": choices(TILE=[16, 64], GATED=[0, 1])
    + [{**layout, "TILE": 64, "GATED": 1} for layout in (*PACKED, {"WEIGHT": "e4m3"})],
    "kv.cu": choices(INFER_F32=[None, 1], **KINDS),
    "layers.cu": choices(TOKENS=[8], WEIGHT=["e4m3"], GROUP=[4, 8], HEAD_DIM=[128])
    + choices(TOKENS=[1, 2], WEIGHT=["bf16", "e4m3"], GROUP=[4], HEAD_DIM=[128])
    + packed(choices(TOKENS=[1, 8], GROUP=[4], HEAD_DIM=[128]), 4),
    "linear.cu": choices(**BOTH, WEIGHT=["bf16", "float", "e4m3"]) + packed(choices(VECTOR=[8])),
    "linear_many.cu": choices(TOKENS=[32, 64, 96, 128], STAGES=[4, 6], WEIGHT=["bf16", "e4m3"], EPILOGUE=[1])
    + choices(TOKENS=[64], GROUPED=[0, 1], EPILOGUE=[2], PAIRED=[1], WEIGHT=["e4m3"])
    + packed(choices(TOKENS=[64, 128], EPILOGUE=[0]) + choices(TOKENS=[32, 128], STAGES=[6], EPILOGUE=[2], PAIRED=[1])),
    "linear_rope.cu": [macros for lists in STREAMED for macros in choices(**lists, PAIRED=[1])]
    + packed(choices(PAIRED=[1], **FEW, **NORMED), 8)
    + packed(choices(PAIRED=[1], TOKENS=[1, 8], DEPTH=[5], **NORMED), 4),
    "linear_stream.cu": [macros for lists in STREAMED for macros in choices(**lists) + choices(**lists, EPILOGUE=[2], PAIRED=[1])]
    + choices(**FEW, **NORMED, EPILOGUE=[2], PAIRED=[1], WEIGHT=["bf16", "e4m3"])
    + choices(**FEW, GROUPED=[1], WEIGHT=["e4m3"])
    + choices(**MORE, GROUPED=[1], WEIGHT=["e4m3"])
    + packed(choices(**FEW, RESIDENT=[0, 1], EPILOGUE=[1]) + choices(**MORE, RESIDENT=[0, 1], EPILOGUE=[1]), 8)
    + packed(choices(EPILOGUE=[2], PAIRED=[1], **FEW, **NORMED), 8)
    + packed(
        choices(**ANY, RESIDENT=[0, 1], EPILOGUE=[1]) + choices(EPILOGUE=[2], PAIRED=[1], TOKENS=[1, 8], DEPTH=[5], **NORMED), 4
    ),
    "linear_warp_group.cu": choices(**GROUPED, TOKENS=[32, 64], GROUPS=[1, 2], STEP_BYTES=[256], OUTPUT=["bf16", "float"])
    + choices(**GROUPED, TOKENS=[64], GROUPS=[1], ROWS=[48], STEP_BYTES=[256], STAGES=[7])
    + choices(**GROUPED, TOKENS=[64], GROUPS=[2], ROWS=[40], STEP_BYTES=[256], STAGES=[5])
    + choices(**GROUPED, TOKENS=[32, 64, 96], GROUPS=[2], ROWS=[112, 128], STEP_BYTES=[128], STAGES=[5])
    + choices(**GROUPED, TOKENS=[32, 64, 96], GROUPS=[2], ROWS=[112, 128], STAGES=[5], EPILOGUE=[2], PAIRED=[1]),
    "linear_wide.cu": choices(**GROUPED, TOKENS=[128], STAGES=[6], OUTPUT=["bf16", "float"])
    + choices(**GROUPED, TOKENS=[192], STAGES=[5], OUTPUT=["bf16", "float"])
    + choices(**GROUPED, TOKENS=[256], STAGES=[4], OUTPUT=["bf16", "float"])
    + choices(**GROUPED, TOKENS=[160, 256], STAGES=[4], OUTPUT=["bf16"], EPILOGUE=[2], PAIRED=[1]),
    "logprobs.cu": ONE,
    "norm.cu": choices(**BOTH, LAYER_NORM=[0, 1])
    + choices(VECTOR=[8], LAYER_NORM=[0, 1], AHEAD=[1])
    + choices(VECTOR=[8], VECTORS=[7], SHARES=[2]),
    "pack.cu": [{**layout, "INFER_F32": 1} for layout in PACKED[:3]]
    + [{**PACKED[index], "FORMAT": number} for number, index in enumerate((2, 0, 3, 1, 4, 5, 6), 1)],
    "pages.cu": ONE,
    "random.cu": choices(INFER_F32=[None, 1]),
    "rope.cu": choices(INFER_F32=[None, 1], INTERLEAVED=[0, 1]),
    "rows.cu": choices(**BOTH, WEIGHT=["bf16", "f16"]) + packed(choices(VECTOR=[8])),
    "sampler.cu": ONE,
    "screen.cu": [SCREENED],
    "screen_many.cu": [{**SCREENED, "TOKENS": 32, "STAGES": 5}, {**SCREENED, "TOKENS": 64, "STAGES": 4}],
    "screen_rough.cu": [{**SCREENED, "TOKENS": 8, "RESIDENT": 1, "DEPTH": 5, "NORM": norm} for norm in (0, 1)],
}


def expand(path: Path, seen: set[Path]) -> str:
    """Return a source with its own headers put in as text, each once, as the package does when it loads kernels."""
    if path in seen:
        return ""
    seen.add(path)
    return LOCAL_INCLUDE.sub(lambda match: expand(ROOT / "cuda" / match[1], seen), path.read_text(encoding="utf-8"))


def compile_for(job: tuple[str, Macros, str]) -> tuple[str, dict[str, dict[str, int]], str]:
    """Compile one variant; returns its name, what each kernel takes, and the compiler's complaint ("" if it had none)."""
    name, macros, architecture = job
    source = expand(ROOT / "cuda" / name, set())
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{macro}={value}" for macro, value in sorted(macros.items())]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    words = log.decode(errors="replace").strip("\0 \n")
    title = " ".join([name, architecture, *(f"{macro}={value}" for macro, value in sorted(macros.items()))])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS or "instructions are serialized" in words:
        return title, {}, words or str(error)
    return title, usage(words), ""


def usage(log: str) -> dict[str, dict[str, int]]:
    """Return what each kernel takes, from the words of the assembler."""
    kernels = {}
    for part in log.split("Compiling entry function")[1:]:
        entry, spills, used = (pattern.search(f"Compiling entry function{part}") for pattern in (ENTRY, SPILLS, USED))
        if entry and used:
            figures = {"registers": int(used[1]), "spilled": int(spills[1]) if spills else 0, "shared": int(used[2] or 0)}
            kernels[entry[1]] = figures
    return kernels


def worse(now: dict[str, int], before: dict[str, int]) -> bool:
    """Return whether a kernel begins to spill, or takes notably more registers."""
    allowed = before["spilled"] + MORE_SPILLS if before["spilled"] else 0
    return now["spilled"] > allowed or now["registers"] > before["registers"] + MORE_REGISTERS


def main() -> int:
    """Compile everything, and name what failed or grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    names = [path.name for path in options.files] or sorted(path.name for path in (ROOT / "cuda").glob("*.cu"))
    jobs = [(name, macros, target) for name in names for macros in VARIANTS[name] for target in ARCHITECTURES]
    with Pool() as pool:
        results = pool.map(compile_for, jobs, chunksize=4)
    stored = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.is_file() else {}
    failures = [f"{title}:\n{words}" for title, _, words in results if words]
    if not options.write:
        for title, kernels, _ in results:
            for kernel, figures in kernels.items():
                before = stored.get(title, {}).get(kernel, {"registers": 255, "spilled": 0})
                if worse(figures, before):
                    failures.append(f"{title}: {kernel} takes {figures}, in cuda/report.json {before}")
    elif not failures:
        stored = {title: figures for title, figures in stored.items() if title.split()[0] not in names}
        stored |= {title: kernels for title, kernels, _ in results}
        REPORT.write_text(json.dumps(stored, sort_keys=True).replace('}, "', '},\n"') + "\n", encoding="utf-8")
    print("\n".join(failures), file=sys.stderr)
    print(f"{len(jobs)} variants compiled, {len(failures)} complaints")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
