"""Signals that end a run: the first lets it save what it has, the second ends it at once.

    with Signals() as signals:
        ...
        if signals.first: save, and raise Stopped

One process handles SIGTERM and SIGINT (Ctrl-C) here. Among many processes SIGTERM is JAX's own: its
preemption service makes all of them agree on a step; a SIGINT is passed on to it.
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
        import jax

        self._many = jax.process_count() > 1
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        kinds = [signal.SIGINT] if self._many else [signal.SIGINT, signal.SIGTERM]
        self._before = {kind: signal.signal(kind, lambda *_: None) for kind in kinds}
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
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
