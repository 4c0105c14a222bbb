"""A limit of time for what does not ask for the time: compilers and autotuners."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

AGAIN = 5.0  # seconds until the next reminder, where somebody took the first for an error of his own


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError after so long, or infinity for none; on the main thread alone, which gets the signal."""
    if seconds == float("inf"):
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError("no time was left")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
