"""A thread that keeps Python's lock busy, for benches and tests of what must not wait for it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["busy_thread"]


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """Compute in Python all the time, on a thread beside the caller's."""
    is_over = threading.Event()

    def compute() -> None:
        while not is_over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
