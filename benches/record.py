"""Where results come from, and how they are kept: as data, with the command, the commit and the machine that made them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"


def first_line(command: list[str]) -> str:
    """The first line that a command prints, empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, its vector instructions, memory, system."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Names may not tell generations apart: "AMD EPYC" is family 25, model 17 for Zen 4, family 26 for Zen 5.
    generation = [int(fields[key]) if fields.get(key, "").isdigit() else None for key in ("cpu family", "model")]
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "family_and_model": generation,
        "cores": os.cpu_count(),
        "instructions": [flag for flag in wanted if flag in flags],
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def origin() -> dict[str, Any]:
    """When, by what and on what a result was made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": first_line(["git", "rev-parse", "HEAD"]),
        "uncommitted_changes": bool(first_line(["git", "status", "--porcelain", "--untracked-files=no"])),
        "load": os.getloadavg()[0],
        "machine": machine(),
    }


def plot(path: Path, draw: Callable[[Any], None]) -> None:
    """A picture of what `draw` does to a matplotlib `Axes`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    draw(axes)
    axes.set_title(path.stem)
    axes.grid(alpha=0.3)
    axes.figure.savefig(path)


def save(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Write a result that has an `origin` to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = result["date"][:16].replace(":", "").replace("T", "-")
    path = folder / f"{name}-{stamp}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
