"""Says where every thread is when a step does not end.

A collective in which one host is missing waits without a word. The stacks on all hosts show which
of them waits for what; the run itself is left alone.
"""

import faulthandler
import os
import socket
import sys
import threading
import time

import jax


class Watchdog:
    """Reports once for every step that takes longer than `seconds`, and again at each doubling."""

    def __init__(self, name: str, step: int, seconds: float):
        self._name, self._step, self._seconds = name, step, seconds
        self._since = time.monotonic()
        self._closed = threading.Event()
        # faulthandler wants a file of the system; where stderr is none, as in a notebook, take ours
        self._file = sys.stderr if _has_descriptor(sys.stderr) else sys.__stderr__

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def ended(self, step: int) -> None:
        """Notes that `step` is done."""
        self._step, self._since = step, time.monotonic()

    def _watch(self) -> None:
        patience, seen = self._seconds, self._step
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if self._step != seen:
                patience, seen = self._seconds, self._step
            waited = time.monotonic() - self._since
            if waited > patience:
                self._report(seen, waited)
                patience = 2 * waited

    def _report(self, step: int, waited: float) -> None:
        where = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
        text = (
            f"stage {self._name!r}: the step after {step} has not ended for {waited:,.0f} s "
            f"({where}, pid {os.getpid()}); its threads are here:\n"
        )
        print(text, end="", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file, all_threads=True)


def _has_descriptor(file) -> bool:
    try:
        return file.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False
