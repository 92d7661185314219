"""Compile every kernel in cuda/ for every GPU generation, through NVRTC: neither a GPU nor a driver is needed.

usage: compile_cuda.py [FILE.cu ...]      (default: all of cuda/*.cu)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cuda.bindings import nvrtc

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
LOCAL_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)


def expand(path: Path, seen: set[Path]) -> str:
    """Return a source with its own headers put in as text, each once, as the package does when it loads kernels."""
    if path in seen:
        return ""
    seen.add(path)
    return LOCAL_INCLUDE.sub(lambda match: expand(ROOT / "cuda" / match[1], seen), path.read_text(encoding="utf-8"))


def header_folders() -> list[str]:
    """Return where the CUDA wheels keep their headers."""
    import nvidia

    return [str(folder) for root in nvidia.__path__ for folder in Path(root).glob("*/include")]


def compile_for(name: str, source: str, architecture: str) -> str:
    """Compile one source; returns the compiler's words, "" if it had none to say."""
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-I{folder}" for folder in header_folders())]
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return ""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.decode(errors="replace").strip("\0 \n") or str(error)


def main() -> int:
    """Compile everything and name what failed."""
    failures = 0
    for path in [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "cuda").glob("*.cu")):
        source = expand(path.resolve(), set())
        for architecture in ARCHITECTURES:
            if words := compile_for(path.name, source, architecture):
                failures += 1
                print(f"{path.name} for {architecture}:\n{words}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
