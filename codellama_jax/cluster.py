"""The processes of one run: how they find each other, share the rows, and end together.

`jax.distributed` finds the cluster on TPU VMs, GKE (xpk), SLURM and Open MPI. It does not say which
host is missing, and a host that ends is noticed after 100 s, by a number. So every process also
keeps a connection to the first one, on the port below the coordinator's: _Line.
"""

import atexit
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from codellama_jax.config import check

BY_HAND = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
MEET = 1_800  # seconds; who ends before is noticed by _Line
LOST = "The last checkpoint is sound: start all processes again to go on from it"


def join(wait: int = 300) -> None:
    """Joins the other processes of a pod or cluster, if this one was started as one of many.

    Ends the process with a sentence that names who is missing after `wait` seconds. On a cluster
    that JAX does not know, set JAX_NUM_PROCESSES, JAX_PROCESS_ID (0, 1, ...) and
    JAX_COORDINATOR_ADDRESS (host:port of process 0); JAX_NUM_PROCESSES=1 looks for no others.
    """
    global _line
    import jax

    given = _given()
    if given.get("num_processes") == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # takes SIGTERM: stop.Vote
    _line = _Line(wait)
    try:
        # jax ends the process when its own time is up: after ours, which names the host
        jax.distributed.initialize(**given, initialization_timeout=wait + 60)
    except Exception as error:
        _line.leave()
        if str(error).startswith("coordinator_address should be defined"):
            return  # no cluster: this process is alone
        raise ValueError(
            f"JAX did not find the processes of this run: {error}. To give them, set "
            f"{', '.join(BY_HAND)}; for this one alone, JAX_NUM_PROCESSES=1"
        ) from error
    _line.joined = True
    atexit.register(leave)


def _given() -> dict[str, int]:
    """What the environment says about the processes, beyond what JAX reads itself."""
    if "JAX_NUM_PROCESSES" not in os.environ:
        # for one task JAX would open a port, which two such tasks of a job would both want
        return {"num_processes": 1} if os.environ.get("SLURM_NTASKS") == "1" else {}
    number = int(os.environ["JAX_NUM_PROCESSES"])
    for name in BY_HAND[1:]:
        check(number == 1 or name in os.environ, f"JAX_NUM_PROCESSES={number} needs {name}, too")
    return {"num_processes": number, "process_id": int(os.environ.get("JAX_PROCESS_ID", "0"))}


def leave(reason: str | None = None) -> None:
    """Tells the other processes that this one ends; with a reason, they end as well."""
    if _line is not None:
        _line.leave(reason)


def many() -> bool:
    """True for one of many processes."""
    return _line is not None and _line.joined


def end(reason: str, code: int, after: float = 0.0) -> None:
    """Ends this process and with it the others, if there are any; returns if it is alone.

    Python's own way out would wait for the others, who wait for this one. after: seconds in which
    it may turn out that another process ended first, and is the reason.
    """
    if not many():
        return
    time.sleep(after)
    sys.stdout.flush()
    sys.stderr.flush()
    leave(reason)
    os._exit(code)


class _Line:
    """A connection of every process with the first, over which they say hello and goodbye.

    A process that is killed says neither: the system closes its connection, and the others end. An
    address that cannot be reached is no error, as long as JAX reaches it on its own port.
    """

    def __init__(self, wait: int):
        self.joined = False
        self._wait, self._closed = wait, False
        self._peers: dict[int, socket.socket] = {}
        self._hosts: dict[int, str] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._open, daemon=True).start()

    def leave(self, reason: str | None = None) -> None:
        """Says goodbye."""
        self._closed = True
        text = reason and f"{self._name(self._process, socket.gethostname())} stopped: {reason}"
        self._tell({"end": text})

    def _open(self) -> None:
        from jax._src import distributed  # what JAX found has no public name

        found = distributed.global_state
        while found.client is None:  # made once the cluster is known, before it waits for all
            if self._closed:
                return
            time.sleep(0.05)
        self._process, self._count = found.process_id, found.num_processes
        if self._count == 1:
            return
        host, _, port = found.coordinator_address.rpartition(":")
        self._until = time.monotonic() + self._wait
        serve = self._serve if self._process == 0 else self._follow
        serve(host.strip("[]"), int(port) - 1)

    # -- the first process -----------------------------------------------------------------------
    def _serve(self, _: str, port: int) -> None:
        listener = self._retry(lambda: socket.create_server(("", port), backlog=self._count))
        if listener is None:
            return
        listener.settimeout(0.2)
        while not self._closed:
            with contextlib.suppress(TimeoutError):
                peer, _ = listener.accept()
                peer.settimeout(None)
                threading.Thread(target=self._hear, args=(peer,), daemon=True).start()
            if not self.joined and time.monotonic() > self._until:
                self._end(self._missing(), all_of_them=True)

    def _hear(self, peer: socket.socket) -> None:
        lines = peer.makefile()
        with contextlib.suppress(ValueError, KeyError):  # of a stranger
            hello = json.loads(lines.readline())
            number, host = int(hello["process"]), str(hello["host"])
            with self._lock:
                self._peers[number], self._hosts[number] = peer, host
            self._watch(lines, self._name(number, host))

    def _missing(self) -> str:
        absent = [str(n) for n in range(1, self._count) if n not in self._hosts]
        there = [self._name(n, host) for n, host in sorted(self._hosts.items())]
        return (
            f"{len(absent)} of {self._count} processes did not arrive within {self._wait} s: "
            f"{', '.join(absent)}. There are process 0 on {socket.gethostname()}"
            f"{''.join(f', {name}' for name in there)}"
        )

    # -- the others ------------------------------------------------------------------------------
    def _follow(self, host: str, port: int) -> None:
        self._until += 30  # the first process may have started later; its own answer is better
        peer = self._retry(lambda: socket.create_connection((host, port), timeout=5))
        if peer is None and not self.joined:
            self._end(f"process 0 at {host} cannot be reached since {self._wait + 30} s")
        if peer is None:
            return
        peer.settimeout(None)
        self._peers[0] = peer
        self._tell({"process": self._process, "host": socket.gethostname()})
        self._watch(peer.makefile(), self._name(0, host))

    # -- both ------------------------------------------------------------------------------------
    def _retry(self, connect: Callable[[], socket.socket]) -> socket.socket | None:
        while not self._closed and time.monotonic() < self._until:
            with contextlib.suppress(OSError):
                return connect()
            time.sleep(0.2)
        return None

    def _watch(self, lines, name: str) -> None:
        """Reads what a peer says until it ends."""
        try:
            said = lines.readline()
        except ConnectionResetError:
            said = ""
        except OSError:  # the network was lost: JAX decides, by its heartbeats
            return
        if self._closed:
            return
        reason = json.loads(said)["end"] if said else f"{name} ended without a word. {LOST}"
        if reason is not None:
            self._end(reason, all_of_them=self._process == 0)

    def _name(self, number: int, host: str) -> str:
        return f"process {number} of {self._count} on {host}"

    def _tell(self, what: dict) -> None:
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # it ended before
                    peer.sendall(json.dumps(what).encode() + b"\n")

    def _end(self, reason: str, *, all_of_them: bool = False) -> None:
        self._closed = True
        os.write(2, f"error: {reason}\n".encode())
        if all_of_them:
            self._tell({"end": reason})
        os._exit(1)


_line: _Line | None = None
_meetings = itertools.count()


# -- devices -------------------------------------------------------------------------------------
def introduce(mesh) -> None:
    """Lets the CPU devices of many processes connect, in every group that a step may form.

    They do so in their first collective, where each waits 30 s for the others and no longer. One
    that compiles on a busy machine is later; so this is done before any of them compiles.
    """
    import jax
    from jax._src import distributed  # a barrier with a time of one's own has no public name

    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [g for n in range(len(axes)) for g in itertools.combinations(axes, n + 1)]

    def meet() -> jax.Array:
        return sum(jax.lax.psum(jax.lax.axis_index(group), group) for group in groups)

    everyone = jax.shard_map(meet, mesh=mesh, in_specs=(), out_specs=jax.P())
    program = jax.jit(everyone).lower().compile()
    distributed.global_state.client.wait_at_barrier(f"introduce-{next(_meetings)}", MEET * 1_000)
    jax.block_until_ready(program())


# -- who reads what? -----------------------------------------------------------------------------
def share(mesh) -> tuple[int, int]:
    """(index, count): this process reads part `index` of the `count` that a batch is cut into.

    Processes whose devices hold the same rows, because a row or a layer is split over them, read
    the same part. Raises ValueError where processes hold rows that overlap only partly.
    """
    import jax

    from codellama_jax import sharding

    place = sharding.batch_sharding(mesh)
    held: dict[int, set] = {}
    for device, (rows,) in place.devices_indices_map((mesh.devices.size,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    check(
        sum(map(len, parts)) == len(set().union(*parts)) and len(set(map(len, parts))) == 1,
        f"the mesh {dict(mesh.shape)} gives processes rows that overlap in part: let tensor * "
        "context divide the devices of a process, or be a multiple of them",
    )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)
