"""The stream of batches is the same for any number of hosts and workers, and after any kill.

With real processes: each is a host that knows its index and reads its rows, with workers of its
own; what they write, put together step by step, must be what one process reads.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import corpus_fixture
import elastic_reader
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import mix

STEPS = 6
COUNTS = (1, 2, 4, 8, 16)
PATIENCE = 600  # seconds, for a machine that does much else

HOSTS = multiprocessing.get_context("forkserver")  # imports once, so that 16 hosts cost like one
HOSTS.set_forkserver_preload(["grain", "codellama_jax.data.mix"])


@functools.cache
def expected() -> list[list[str]]:
    """The digests of the rows of every step."""
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    batches = mix.batches(elastic_reader.data(), folder, tokenizer, steps=STEPS)
    return [elastic_reader.digests(batch) for batch in batches]


def start_hosts(folder: Path, *, start=0, count=1, workers=0, indices=None) -> dict[int, tuple]:
    """Starts hosts of `count`, all or those of `indices`: {index: (process, file it writes)}."""
    prepared, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer().path
    hosts = {}
    for index in range(count) if indices is None else indices:
        out = folder / f"{start}-{index}-of-{count}"
        args = (str(prepared), tokenizer, str(out), start, STEPS, index, count, workers)
        process = HOSTS.Process(target=elastic_reader.host, args=args)
        process.start()
        hosts[index] = process, out
    return hosts


def lines(hosts: dict[int, tuple]) -> dict[int, list[list[str]]]:
    """What every host has written: steps of rows."""
    return {
        i: [line.split() for line in out.read_text().splitlines()] for i, (_, out) in hosts.items()
    }


def read(hosts: dict[int, tuple]) -> dict[int, list[list[str]]]:
    """Waits for the hosts; what each has read."""
    for process, _ in hosts.values():
        process.join(PATIENCE)
    assert [process.exitcode for process, _ in hosts.values()] == [0] * len(hosts)
    return lines(hosts)


def share(index: int, count: int, *, start=0, steps=STEPS) -> list[list[str]]:
    """The rows that host `index` of `count` has to read."""
    size = elastic_reader.ROWS // count
    return [step[index * size : (index + 1) * size] for step in expected()[start:steps]]


def kill(hosts: dict[int, tuple], *, after: int) -> None:
    """Kills the hosts, workers and all, once each has read `after` steps."""
    until = time.monotonic() + PATIENCE
    while not all(
        out.exists() and out.read_text().count("\n") >= after for _, out in hosts.values()
    ):
        assert time.monotonic() < until
        assert all(process.exitcode in (None, 0) for process, _ in hosts.values())
        time.sleep(0.02)
    for process, _ in hosts.values():
        with contextlib.suppress(ProcessLookupError):  # it was through before the others had begun
            os.killpg(process.pid, signal.SIGKILL)
        process.join(PATIENCE)


def killed_and_resumed(folder: Path, life: list[tuple[int, int]], workers: int) -> None:
    """Hosts of each (count, steps) are killed after that many steps; others go on to the end."""
    step = 0
    for count, steps in life:
        hosts = start_hosts(folder, start=step, count=count, workers=workers)
        if step + steps >= STEPS:
            break
        kill(hosts, after=steps)
        for index, read_by_one in lines(hosts).items():
            assert read_by_one[:steps] == share(index, count, start=step, steps=step + steps)
        step += steps
    for index, read_by_one in read(hosts).items():
        assert read_by_one == share(index, count, start=step)


def test_killed_hosts_are_followed_by_another_number_of_hosts(tmp_path):
    killed_and_resumed(tmp_path, [(2, 2), (1, STEPS)], workers=1)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(COUNTS), st.integers(1, 3)), min_size=2, max_size=4))
def test_after_any_kill_any_number_of_hosts_goes_on(life):
    with tempfile.TemporaryDirectory() as folder:
        killed_and_resumed(Path(folder), [*life, (life[0][0], STEPS)], workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_hosts_and_workers_reads_the_same(tmp_path, count, workers):
    """Hosts know nothing of each other: of many with workers, the first and the last are run."""
    indices = range(count) if workers == 0 or count < 4 else (0, count - 1)
    if workers == 4:
        indices = [count - 1]
    start = {0: 0, 1: 1, 4: 3}[workers] + count % 3
    hosts = start_hosts(tmp_path, start=start, count=count, workers=workers, indices=indices)
    for index, read_by_one in read(hosts).items():
        assert read_by_one == share(index, count, start=start)
