"""Say what is missing before a build starts: README's first command runs this, so it must itself run on any Python 3."""

import os
import re
import shutil
import subprocess
import sys

PYTHON = (3, 11)
RUST = (1, 89)


def python_problems():
    """Yield what is wrong with this Python."""
    if sys.version_info < PYTHON:
        yield "Python {}.{} or newer is needed, this is {}.{}.".format(*PYTHON, *sys.version_info[:2])
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield "Python's venv module is missing: on Debian and Ubuntu, apt-get install python3-venv."


def rust_problems():
    """Yield what is wrong with the Rust tools and the linker they call."""
    if not shutil.which("cargo") or not shutil.which("rustc"):
        yield "Rust (cargo and rustc) was not found: install it from https://rustup.rs, then open a new shell."
        return
    said = subprocess.run(["rustc", "--version"], stdout=subprocess.PIPE, check=False).stdout.decode()
    match = re.search(r"(\d+)\.(\d+)", said)
    if not match:
        yield "rustc is there but does not run (rustup without a toolchain?): run `rustup default stable`."
    elif tuple(map(int, match.groups())) < RUST:
        yield "Rust {}.{} or newer is needed, found {}: run `rustup update`.".format(*RUST, said.strip())
    if os.name == "posix" and not shutil.which(os.environ.get("CC", "cc")):
        yield "A C compiler was not found; Rust links with it: apt-get install gcc libc6-dev, or xcode-select --install."


def main():
    """Print every problem at once and fail if there is one."""
    problems = list(python_problems()) + list(rust_problems())
    for problem in problems:
        sys.stderr.write("missing: " + problem + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
