"""The progress bar of long work, in the places where vLLM shows one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from infer._core import InferError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from infer.outputs import RequestOutput

__all__ = ["Progress", "progress"]

Progress: TypeAlias = "bool | Callable[..., Any] | None"
DELAY = 1.0  # seconds; nobody needs a bar for less


@contextlib.contextmanager
def progress(use_tqdm: Progress, total: int) -> Iterator[Callable[[RequestOutput], None]]:
    """Show a bar over `total` prompts; yields the function to call with each that is done.

    Parameters
    ----------
    use_tqdm
        True and False as they say; None for a bar that appears on a terminal after a second; or a replacement for `tqdm`.
    total
        Number of prompts.
    """
    if use_tqdm is not None and not isinstance(use_tqdm, bool) and not callable(use_tqdm):
        raise InferError(f"use_tqdm must be True, False, None or a replacement for tqdm.tqdm, got {use_tqdm!r:.80}")
    if use_tqdm is False or total == 0 or (use_tqdm is None and not sys.stderr.isatty()):
        yield lambda done: None
        return
    from tqdm import tqdm

    make = use_tqdm if callable(use_tqdm) else tqdm
    more = {"delay": DELAY} if use_tqdm is None else {}
    bar = make(total=total, desc="Processed prompts", unit="prompt", dynamic_ncols=True, **more)
    start, read, written = time.monotonic(), 0, 0

    def advance(done: RequestOutput) -> None:
        nonlocal read, written
        read += done.metrics.prompt_tokens
        written += done.metrics.generated_tokens
        elapsed = max(time.monotonic() - start, 1e-9)
        bar.set_postfix_str(f"input {read / elapsed:.1f} tokens/s, output {written / elapsed:.1f} tokens/s", refresh=False)
        bar.update(1)

    try:
        yield advance
    finally:
        bar.close()
