"""News of running requests, for callers that wait in a thread and for callers that wait in an event loop.

The core wakes one `ReadyQueue` per waiter. A blocking call owns its queue. All tasks of all event loops share one queue and
one thread per `LLM`, started by the first of them: a thread per request would not scale, and polling would cost latency.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

from infer._core import InferError, QueueFullError, ReadyQueue

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, Callable, Generator

    from infer._core import Request, Update

    Submit: TypeAlias = "Callable[[ReadyQueue, int], Request]"  # queue and key under which it is reported
    Room: TypeAlias = "Callable[[], bool] | None"  # waits until a request may be submitted
    News: TypeAlias = "tuple[int, Request, list[Update]]"  # which of the submitted ones, itself, what is new

__all__ = ["Dispatcher", "wait_all"]


def wait_all(submits: list[Submit], room: Room = None) -> Generator[News, None, None]:
    """Submit everything, then yield news as they come until all have finished.

    With `room`, a full queue is waited for instead of raising.

    Leaving early, by an exception (Ctrl-C too) or by closing the iterator, cancels what still runs.
    """
    queue = ReadyQueue()
    requests: list[Request] = []
    try:
        for key, submit in enumerate(submits):
            requests.append(_submit(submit, room, queue, key))
        inboxes = [_Inbox(request) for request in requests]
        running = len(inboxes)
        while running:
            for key in queue.wait():
                updates, ended = inboxes[key].take()
                running -= ended
                if updates:
                    yield key, requests[key], updates
    finally:
        for request in requests:
            request.cancel()


def _submit(submit: Submit, room: Room, queue: ReadyQueue, key: int) -> Request:
    while True:
        try:
            return submit(queue, key)
        except QueueFullError:
            if room is None:
                raise
        room()


class _Inbox:
    """What one request has said and nobody has read.

    The core says that a request is over a moment after the last update. An update that ends a completion is held back
    until then, so that whoever reads the last one finds the metrics final.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._held: list[Update] = []
        self._ended = False

    def take(self) -> tuple[list[Update], bool]:
        """Return what may be read, and whether the request has ended just now."""
        self._held += self._request.poll()
        if self._request.finished:
            ready, self._held = self._held, []
        else:
            ready = [update for update in self._held if update.finish_reason is None]
            self._held = [update for update in self._held if update.finish_reason is not None]
        just_now = self._request.finished and not self._ended
        self._ended |= just_now
        return ready, just_now


class _Listener:
    """One task's requests: which have news, and the event that wakes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self._loop = loop
        self._event = event
        self.ready: deque[int] = deque()

    def tell(self, place: int) -> None:
        """Report news of the task's request number `place`, from any thread."""
        self.ready.append(place)
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop was closed with the task still waiting in it: nobody is left to tell
            self.ready.clear()


class Dispatcher:
    """The thread that hands the core's news to event loops."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._queue = ReadyQueue()
        self._keys = itertools.count()
        self._listeners: dict[int, tuple[_Listener, int]] = {}
        self._lock = threading.Lock()
        self._stopping = False
        # Its thread begins with the first task that waits.
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="infer-room")
        self._thread = threading.Thread(target=self._run, name="infer-events", daemon=True)
        self._thread.start()

    async def wait_all(self, submits: list[Submit], room: Room = None) -> AsyncGenerator[News, None]:
        """Do as the function of this name does, without blocking the loop."""
        import asyncio

        event = asyncio.Event()
        listener = _Listener(asyncio.get_running_loop(), event)
        keys = [self._listen(listener, place) for place in range(len(submits))]
        requests: list[Request] = []
        try:
            for submit, key in zip(submits, keys, strict=True):
                requests.append(await self._submit(submit, room, key))
            inboxes = [_Inbox(request) for request in requests]
            running = len(inboxes)
            while running:
                await event.wait()
                event.clear()
                while listener.ready:
                    place = listener.ready.popleft()
                    updates, ended = inboxes[place].take()
                    running -= ended
                    if updates:
                        yield place, requests[place], updates
        finally:
            for request in requests:
                request.cancel()
            with self._lock:
                for key in keys:
                    self._listeners.pop(key, None)

    async def _submit(self, submit: Submit, room: Room, key: int) -> Request:
        import asyncio

        while True:
            try:
                # Tokenizing a long prompt takes milliseconds, which belong to the other tasks of this loop.
                return await asyncio.to_thread(submit, self._queue, key)
            except QueueFullError:
                if room is None:
                    raise
            # Tasks that wait take turns on one thread: each on one of the loop's own, they would leave it none for anybody else.
            with contextlib.suppress(RuntimeError):  # shut down in between: the next attempt says that the LLM is closed
                await asyncio.wrap_future(self._waiting.submit(room))

    def stop(self) -> None:
        """Deliver what is still there and end the thread; harmless when repeated."""
        with self._lock:
            self._stopping = True
        self._waiting.shutdown(wait=False)
        with contextlib.suppress(InferError):  # in a forked child, where there is neither queue nor thread
            self._queue.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _listen(self, listener: _Listener, place: int) -> int:
        with self._lock:
            if self._stopping:
                raise InferError("this LLM is closed")
            key = next(self._keys)
            self._listeners[key] = (listener, place)
        return key

    def _run(self) -> None:
        while not self._stopping:
            self._tell(self._queue.wait())
        self._tell(self._queue.wait(0.0))
        with self._lock:
            rest = list(self._listeners.values())
        for listener, place in rest:  # whatever still waits finds its request aborted
            listener.tell(place)

    def _tell(self, keys: list[int]) -> None:
        with self._lock:
            told = [self._listeners[key] for key in keys if key in self._listeners]
        for listener, place in told:
            listener.tell(place)
