"""Energy that the GPU takes, from the driver's own counter (NVML), without any package.

The counter is not renewed with every step, so steps are charged with the power of the last quarter of a second in which there was
work: the core shares a step's energy out among its requests by their rows. Asked while the GPU is busy, the driver takes 5 to 15
milliseconds to answer, more than many a step: a thread of its own asks.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 0.25  # seconds between two looks at the counter
LOOKS = 5  # in that time, for whether there was work
IDLE = 0.1  # seconds without a step after which the time before does not count


def counter(bus_id: str) -> Callable[[], float] | None:
    """Return what tells the joules that a GPU took since the driver was loaded; None where nobody counts."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle)):
            return None
        read = library.nvmlDeviceGetTotalEnergyConsumption
    except (OSError, AttributeError):
        return None

    def joules() -> float:
        return value.value / 1000 if read(handle, ctypes.byref(value)) == 0 else float("nan")

    return joules if joules() == joules() else None


class PowerMeter:
    """Mean power while there is work.

    Parameters
    ----------
    joules
        Tells the joules taken so far.
    clock
        Seconds.
    """

    def __init__(self, joules: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._joules, self._clock = joules, clock
        self._began = self._seen = clock()
        self._before = joules()

    def step(self) -> float | None:
        """A step was done; return the watts of the time since the last answer, when it has been long enough."""
        now = self._clock()
        idle, self._seen = now - self._seen > IDLE, now
        if not idle and now - self._began < INTERVAL:
            return None
        taken, span = self._joules() - self._before, now - self._began
        self._before, self._began = self._before + taken, now
        return None if idle else taken / span


class PowerWatch:
    """A thread that tells the power again and again while there is work.

    Parameters
    ----------
    meter
        What measures.
    report
        Is told the watts.
    wait
        Waits until a step was done since the last time; False when there will be no more.
    """

    def __init__(self, meter: PowerMeter, report: Callable[[float], None], wait: Callable[[], bool]) -> None:
        self._meter, self._report, self._wait = meter, report, wait
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="infer-power", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after the last step."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(INTERVAL / LOOKS) and self._wait():
            if (watts := self._meter.step()) is not None:
                self._report(watts)
