"""The stream of batches is the same for any number of hosts and workers, and after any kill.

With real processes: each is a host that knows its index and reads its rows; what they write,
put together step by step, must be what one process reads.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus_fixture
import elastic_reader
import pytest

from codellama_jax.data import mix

READER = Path(__file__).parent / "elastic_reader.py"
STEPS = 6


@pytest.fixture(scope="module")
def expected():
    """The digests of the rows of every step."""
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    batches = mix.batches(elastic_reader.data(), folder, tokenizer, steps=STEPS)
    return [elastic_reader.digests(batch) for batch in batches]


def start_hosts(folder: Path, *, start=0, count=1, workers=0) -> list[tuple]:
    """Starts `count` processes; returns them with the files that they write."""
    prepared, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer().path
    hosts = []
    for index in range(count):
        out = folder / f"{start}-{index}-of-{count}"
        numbers = map(str, (start, STEPS, index, count, workers))
        command = [sys.executable, READER, prepared, tokenizer, out, *numbers]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        hosts.append((subprocess.Popen(command, env=environment, start_new_session=True), out))
    return hosts


def read(hosts: list[tuple]) -> list[list[str]]:
    """Waits for the hosts; their rows, put together step by step."""
    assert [process.wait(timeout=300) for process, _ in hosts] == [0] * len(hosts)
    lines = [out.read_text().splitlines() for _, out in hosts]
    return [[d for line in step for d in line.split()] for step in zip(*lines, strict=True)]


def kill(hosts: list[tuple], *, after: int) -> None:
    """Kills the hosts, workers and all, once each has read some steps."""
    while not all(out.exists() and out.read_text().count("\n") >= after for _, out in hosts):
        assert all(process.poll() in (None, 0) for process, _ in hosts)
        time.sleep(0.02)
    for process, _ in hosts:
        with contextlib.suppress(ProcessLookupError):  # it was through before the others had begun
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_hosts_are_followed_by_another_number_of_hosts(expected, tmp_path):
    hosts = start_hosts(tmp_path, count=2)
    kill(hosts, after=2)
    before = [out.read_text().splitlines()[:2] for _, out in hosts]
    joined = [[d for line in step for d in line.split()] for step in zip(*before, strict=True)]
    assert joined == expected[:2]
    assert read(start_hosts(tmp_path, start=2, count=1, workers=1)) == expected[2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "workers", "start"), [(1, 4, 0), (4, 0, 1), (4, 1, 5), (8, 0, 3), (16, 0, 0)]
)
def test_any_number_of_hosts_and_workers_reads_the_same(expected, tmp_path, count, workers, start):
    hosts = start_hosts(tmp_path, start=start, count=count, workers=workers)
    assert read(hosts) == expected[start:]
