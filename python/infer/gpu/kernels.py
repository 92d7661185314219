"""Kernels from source: includes put in as text, compiled by NVRTC, kept on disk, loaded by the driver; or compiled before.

The sources are part of the extension module. They are expanded here and compiled whole, so the cache's key, a digest of the
text, options, architecture and compiler, covers everything that matters; CuPy's own cache would not see a changed header. The
sources need no header of CUDA. NVRTC comes with CuPy's wheels or a CUDA toolkit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from infer._core import InferError
from infer.gpu import prebuilt
from infer.gpu.launch import DEPENDENT, Kernel, check, driver, signatures

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LOCAL_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)
HAS_OWN_FEATURES = (90, 100, 103, 120, 121)  # architectures whose `a` variant has instructions of its own


def expand(sources: Mapping[str, str], name: str) -> str:
    """Return a source with its own headers put in as text, each once."""
    seen: set[str] = set()

    def text(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        return LOCAL_INCLUDE.sub(lambda match: text(match[1]), sources[file])

    return text(name)


def architecture_name(major: int, minor: int) -> str:
    """Return NVRTC's name of a compute capability, such as sm_90a."""
    number = major * 10 + minor
    return f"sm_{number}a" if number in HAS_OWN_FEATURES else f"sm_{number}"


def cache_folder() -> Path:
    """Return where compiled kernels are kept: INFER_KERNEL_CACHE, or a folder in the user's cache."""
    if named := os.environ.get("INFER_KERNEL_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infer" / "kernels"


class Kernels:
    """All kernels of one device, compiled when first asked for. The device must be current."""

    def __init__(self, sources: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        from cupy.cuda import runtime

        if sources is None:
            from infer._core import kernel_sources

            sources = kernel_sources()
        properties = runtime.getDeviceProperties(runtime.getDevice())
        runtime.free(0)  # makes the device's context current in this thread
        self.capability = properties["major"] * 10 + properties["minor"]
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.shared_limit = int(properties["sharedMemPerBlockOptin"])
        self.architecture = architecture_name(properties["major"], properties["minor"])
        self._driver_version = runtime.driverGetVersion()
        self._sources = dict(sources)
        self._folder, self._prebuilt = folder or cache_folder(), prebuilt.FOLDER
        self._modules: dict[tuple[str, int, tuple[str, ...]], ctypes.c_void_p] = {}
        self._kernels: dict[tuple[object, ...], Kernel] = {}

    def get(self, file: str, name: str, carveout: int = 100, /, **macros: int | str) -> Kernel:
        """Return a kernel of ``file`` (``norm.cu``) compiled with the given macros; 0 defines a macro as 0, like any number.

        ``carveout`` is how many hundredths of a multiprocessor's memory are shared memory while it runs; the rest caches.
        """
        key = (file, name, carveout, *macros.items())
        if found := self._kernels.get(key):
            return found
        defines = tuple(f"-D{macro}={value}" for macro, value in sorted(macros.items()))
        module = self._modules.get((file, carveout, defines))
        source = expand(self._sources, file)
        if module is None:  # of one module, a function would be the same with another carve-out
            module = self._modules[file, carveout, defines] = self._load(file, source, defines)
        function = ctypes.c_void_p()
        check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"kernel {name} of {file}")
        codes = signatures(source)[name]
        kernel = Kernel(function.value or 0, name, codes, self.capability >= DEPENDENT, carveout)
        self._kernels[key] = kernel
        return kernel

    def _load(self, file: str, source: str, defines: tuple[str, ...]) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        before = prebuilt.read(self.architecture, prebuilt.digest(source, defines, self.architecture), self._prebuilt)
        # A driver older than the compiler may refuse it.
        if before is not None and driver().cuModuleLoadData(ctypes.byref(module), before) == 0:
            return module
        path = self._folder / f"{self._digest(source, defines)}.cubin"
        with contextlib.suppress(OSError):
            # A file that was cut short or altered is refused by the driver, and made again.
            if driver().cuModuleLoadData(ctypes.byref(module), path.read_bytes()) == 0:
                return module
        code = compile_source(file, source, (f"--gpu-architecture={self.architecture}", *defines))
        check(driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {file}")
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            keep(path, code)
        return module

    def _digest(self, source: str, defines: Iterable[str]) -> str:
        from cupy_backends.cuda.libs import nvrtc

        return prebuilt.digest(source, defines, self.architecture, str(nvrtc.getVersion()), str(self._driver_version))


def compile_source(name: str, source: str, options: Iterable[str]) -> bytes:
    """Compile one expanded source to machine code."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, (*options, "--std=c++17"))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise InferError(f"{name} does not compile: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def keep(path: Path, code: bytes) -> None:
    """Write a file whole or not at all, also when several processes do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    Path(file.name).replace(path)
