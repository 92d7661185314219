"""Kernels that were compiled before: machine code in the package, an archive for each architecture, if the wheel has some.

`tools/prebuild_cuda.py` writes them. A kernel is found by a digest of its expanded source, its macros and the architecture, so
code of other sources is never taken; what is missing is compiled as it always is.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FOLDER = Path(__file__).parent / "prebuilt"


def digest(source: str, defines: Iterable[str], *more: str) -> str:
    """Return the name of one compiled source: of everything that decides what the compiler makes of it."""
    return hashlib.sha256("\0".join([source, *defines, *more]).encode()).hexdigest()[:40]


def archive(architecture: str, folder: Path = FOLDER) -> Path:
    """Return where an architecture's kernels are."""
    return folder / f"{architecture}.zip"


def read(architecture: str, name: str, folder: Path = FOLDER) -> bytes | None:
    """Return the machine code of a digest; None if there is none, or the archive cannot be read."""
    with contextlib.suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(archive(architecture, folder)) as opened:
        return opened.read(name)
    return None


def write(architecture: str, kernels: Mapping[str, bytes], folder: Path = FOLDER) -> Path:
    """Write an architecture's kernels, by their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    path = archive(architecture, folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as opened:
        for name in sorted(kernels):
            # Without times: the same kernels make the same file.
            opened.writestr(zipfile.ZipInfo(name), kernels[name], zipfile.ZIP_DEFLATED)
    return path
