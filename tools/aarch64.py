"""Build the Rust tests for aarch64 and run them in an emulator, on instruction sets from plain NEON to I8MM.

usage: aarch64.py [--quick] [--skip-if-missing]

--quick            the kernels, golden models and batch invariance only, as `.ci/run` does
--skip-if-missing  where compiler, linker or emulator cannot be had, say so and succeed

The compiler is rustup's, with the target's standard library, which this adds. A linker (`aarch64-linux-gnu-gcc`) and an
emulator (`qemu-aarch64-static`) that are installed are used; otherwise Debian's or Ubuntu's packages are unpacked into
target/aarch64-tools, about 110 MB to fetch and 540 MB to keep, which needs no root and changes nothing outside that folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = "aarch64-unknown-linux-gnu"
TOOLS = ROOT / "target" / "aarch64-tools"
PACKAGES = ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user-static")
FETCH_SECONDS = 300  # for one command that downloads

# Processors that the emulator knows, and what their best instruction set is.
PROCESSORS = {"cortex-a53": "neon", "cortex-a76": "neon_dotprod", "max": "neon_i8mm"}

# What `--quick` takes. One set of packages for all steps: another would ask for other features, and compile everything again.
QUICK_PACKAGES = ("--package=infer-kernels", "--package=infer-model")
QUICK = ("--lib", "--test=ops_rows", "--test=quant", "--test=invariance", "--test=pages", "--test=programs")
# These start the test program once more as a process of its own, which the emulator does not carry over.
SKIPPED = ("hostile_files_stay_within_their_budget", "killed_processes_leave_only_whole_pages")


class MissingError(Exception):
    """What cannot be had here."""


@dataclass(frozen=True)
class Tools:
    """What builds and runs programs for aarch64."""

    linker: Path
    emulator: Path
    libraries: Path  # the folder that holds lib/ld-linux-aarch64.so.1


def output(*command: str | Path, folder: Path = ROOT) -> str:
    """Return what a command prints; its failure is a MissingError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=FETCH_SECONDS, cwd=folder)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise MissingError(f"`{' '.join(map(str, command))}` failed: {said.strip()}") from error
    return done.stdout


def add_target() -> None:
    """See that the compiler has a standard library for aarch64."""
    sysroot = Path(output("rustc", "--print", "sysroot").strip())
    if (sysroot / "lib" / "rustlib" / TARGET).exists():
        return
    if not shutil.which("rustup"):
        raise MissingError(f"this Rust has no standard library for {TARGET}, and there is no rustup to add it")
    print(f"rustup target add {TARGET}", flush=True)
    output("rustup", "target", "add", TARGET)


def installed_tools() -> Tools | None:
    """Return what the machine has, if it has all."""
    linker = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    libraries = Path("/usr/aarch64-linux-gnu")
    if linker and emulator and (libraries / "lib").exists():
        return Tools(Path(linker), Path(emulator), libraries)
    return None


def unpacked_tools() -> Tools:
    """Return what was unpacked from packages, now or earlier."""
    root = TOOLS / "root"
    linker = TOOLS / "aarch64-gcc"
    if not linker.exists():
        fetch(root)
        # The compiler driver finds its parts beside itself, but neither the target's libraries nor those of its own linker.
        libraries = next((root / "usr" / "lib").glob("*/libbfd-*.so")).parent
        driver = root / "usr" / "bin" / "aarch64-linux-gnu-gcc"
        linker.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{driver}" --sysroot="{root}" "$@"\n')
        linker.chmod(0o755)
    emulator = root / "usr" / "bin" / "qemu-aarch64-static"
    if not emulator.exists():
        raise MissingError(f"the packages hold no {emulator.name}")
    return Tools(linker, emulator, root / "usr" / "aarch64-linux-gnu")


def fetch(root: Path) -> None:
    """Download the packages and those they need, and unpack them."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise MissingError(f"neither aarch64-linux-gnu-gcc with qemu-aarch64-static nor apt-get to fetch {', '.join(PACKAGES)}")
    print(f"fetching {', '.join(PACKAGES)} into {TOOLS}", flush=True)
    shutil.rmtree(TOOLS, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial", "packages", "root"):
        (TOOLS / folder).mkdir(parents=True)
    # Own lists and an own cache: no root is needed, and the machine's stay as they are.
    own = [f"-oDir::State::lists={TOOLS}/lists", f"-oDir::Cache={TOOLS}/cache", "-oDebug::NoLocking=1"]
    if os.geteuid() == 0:
        own.append("-oAPT::Sandbox::User=root")
    with contextlib.suppress(MissingError):  # one source may be out of reach: the next command judges
        output("apt-get", *own, "-qq", "update")
    plan = output("apt-get", *own, "-s", "--no-install-recommends", "install", *PACKAGES)
    names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    output("apt-get", *own, "-qq", "download", *names, folder=TOOLS / "packages")
    for package in sorted((TOOLS / "packages").glob("*.deb")):
        output("dpkg-deb", "-x", package, root)
    for folder in ("packages", "cache", "lists"):
        shutil.rmtree(TOOLS / folder)


def options(tools: Tools) -> list[str]:
    """Return cargo's options for the linker and the emulator."""
    table = f"target.{TARGET}"
    return [f"--config={table}.linker='{tools.linker}'", f"--config={table}.runner=['{tools.emulator}']", "--target", TARGET]


def run(what: str, command: list[str], **environment: str) -> int:
    """Run a command with these variables added; print its time; return its exit status."""
    start = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode
    print(f"aarch64, {what}: {'passed' if status == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return status


def tests(tools: Tools, processor: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs tests on a processor, and its environment."""
    skipped = [word for name in SKIPPED for word in ("--skip", name)]
    command = ["cargo", "test", "--release", "--quiet", *options(tools), *arguments, "--", *skipped]
    return command, {"QEMU_CPU": processor, "QEMU_LD_PREFIX": str(tools.libraries)}


def run_tests(tools: Tools, *, quick: bool) -> int:
    """Run the suite with everything that the emulator has, then what depends on the processor on each; return how many failed."""
    steps: list[tuple[str, str, tuple[str, ...]]] = []
    steps += [("golden models", processor, ("--test=goldens",)) for processor in PROCESSORS]
    steps += [("instruction sets", processor, ("--lib", "simd::")) for processor in PROCESSORS]
    if quick:
        # Attention multiplies no bytes, so that its code is one for all NEON, and a plain processor tests it.
        steps += [("kernels and models", "max", QUICK), ("attention", "cortex-a53", ("--test=ops_attention",))]
    else:
        steps += [("whole suite", "max", ())]
    failures = 0
    for what, processor, arguments in steps:
        command, environment = tests(tools, processor, *(QUICK_PACKAGES if quick else ()), *arguments)
        # A test of the kernels compares this with what it finds.
        environment["INFER_TEST_BEST_ISA"] = PROCESSORS[processor]
        failures += run(f"{what} on {processor}", command, **environment) != 0
    return failures


def main() -> int:
    """Do what the arguments ask for; return how many steps failed."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    for option in ("--quick", "--skip-if-missing"):
        parser.add_argument(option, action="store_true")
    arguments = parser.parse_args()
    try:
        add_target()
        tools = installed_tools() or unpacked_tools()
        return run_tests(tools, quick=arguments.quick)
    except MissingError as error:
        print(f"aarch64: LEFT OUT: {error}" if arguments.skip_if_missing else f"aarch64: {error}", file=sys.stderr, flush=True)
        return 0 if arguments.skip_if_missing else 1


if __name__ == "__main__":
    sys.exit(main())
