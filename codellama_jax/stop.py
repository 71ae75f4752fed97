"""Signals that end a run: the first lets it save what it has, the second ends it at once.

    with Signals() as signals:
        ...
        if signals.first: save, and raise Stopped

Among many processes each notices its own; Vote makes all of them stop at the same step.
"""

import os
import signal
import socket
import threading


class Stopped(Exception):
    """A run that was told to end, and kept what it had. `signum`: by which signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class Signals:
    """Notices signals while it is open, also while the main thread waits for the compiler."""

    def __init__(self):
        self.first: int | None = None  # signal that came first

    def __enter__(self) -> "Signals":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._before = {
            kind: signal.signal(kind, lambda *_: None) for kind in (signal.SIGINT, signal.SIGTERM)
        }
        # Python calls handlers between two of its instructions, which may be minutes away; the
        # number of the signal is written to this socket at once
        self._fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._fd)
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._write.close()  # ends the thread

    def _watch(self) -> None:
        with self._read:
            while data := self._read.recv(1):
                if data[0] in self._before:
                    self._notice(data[0])

    def _notice(self, kind: int) -> None:
        name = signal.Signals(kind).name
        if self.first is not None:
            os.write(2, f"{name} again: ends at once\n".encode())
            os._exit(128 + kind)
        self.first = kind
        os.write(2, f"{name}: ends after this step, with a checkpoint; again: at once\n".encode())


class Vote:
    """Has one of the processes been told to stop? They learn it at the same step, or hang.

    Each gives its answer to the devices behind a step, and reads what came of the step before:
    nobody waits. JAX's own service for this agrees apart from the devices; on a busy machine one
    process was told to stop, and another was two steps further.
    """

    def __init__(self, mesh):
        import jax

        self._each = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
        all_of_them = jax.sharding.NamedSharding(mesh, jax.P())
        self._highest = jax.jit(lambda x_N: x_N.max(), out_shardings=all_of_them)
        self._before = None

    def __call__(self, mine: int) -> int:
        """The highest number that any process gave in the call before this one; 0 at first."""
        import jax
        import numpy as np

        answers_N = jax.make_array_from_callback(
            (self._each.mesh.size,), self._each, lambda _: np.full(1, mine, np.int32)
        )
        before, self._before = self._before, self._highest(answers_N)
        return 0 if before is None else int(before)
