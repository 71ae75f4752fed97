"""A tiny stage, and how it is trained in processes of its own: for test_train, test_processes.

    python stage_process.py STAGE.json WORKDIR [WAIT]

SIGNAL_AT="3:SIGKILL" in the environment makes the process send itself that signal at step 3.
ERROR_AT="3" makes it fail there, as on a full disk.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import corpus_fixture
import jax
import numpy as np
import spine_fixture as tiny

from codellama_jax import checkpoint, cluster, config, launch, metrics, train

KEEP_PROGRAMS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
TIMEOUT = 900


def new_workdir(folder: Path) -> Path:
    """A workdir with the tokenizer of the tiny corpus."""
    folder.mkdir(parents=True)
    shutil.copy(corpus_fixture.tokenizer().path, folder / "tokenizer.model")
    return folder


def code_stage(**changes) -> config.Stage:
    model = replace(tiny.MODEL, vocab_size=corpus_fixture.tokenizer().vocab_size, max_seq_len=128)
    settings = {
        "model": model,
        "data": corpus_fixture.data(corpus=str(corpus_fixture.prepared().folder)),
        "steps": 12,
        "log_every": 1,
        "save_every": 5,
        "eval_every": 6,
        "eval_rows": 8,
    }
    return tiny.stage(**settings | changes)


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without the times it took."""
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")}
        for line in metrics.read(folder)
    ]


def weights(folder: Path) -> dict:
    return checkpoint.load(folder)[1]


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


# -- processes -----------------------------------------------------------------------------------
def start(
    stage: config.Stage, workdir: Path, programs: str, log: Path, wait: int = TIMEOUT, **environment
) -> subprocess.Popen:
    """The stage in a process of its own. `programs`: folder that keeps compiled ones."""
    keep = {name.upper(): str(value) for name, value in KEEP_PROGRAMS.items()}
    keep |= {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_NUM_PROCESSES": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, __file__, json.dumps(config.to_json(stage)), workdir, str(wait)],
            env=os.environ | keep | environment,
            stdout=output,
            stderr=output,
        )


def free_ports() -> int:
    """A port with the one below it, of those that systems do not give to outgoing connections."""
    while True:
        port = random.SystemRandom().randint(10_000, 32_000)
        with ExitStack() as trials, suppress(OSError):
            for number in (port - 1, port):
                trials.enter_context(socket.socket()).bind(("localhost", number))
            return port


def ended(processes: list[subprocess.Popen]) -> list[int]:
    """The exit status of each; none is left behind."""
    until = time.monotonic() + TIMEOUT
    try:
        return [process.wait(max(until - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def signal_at(text: str) -> None:
    """Sends this process a signal once it has dispatched a step: "3:SIGTERM"."""
    at, name = text.split(":")
    stepped = metrics.Record.stepped

    def stepped_and_told(record, values):
        stepped(record, values)
        if record.step == int(at):
            os.kill(os.getpid(), signal.Signals[name])

    metrics.Record.stepped = stepped_and_told


def error_at(step: str) -> None:
    """Fails once this process has dispatched a step."""
    stepped = metrics.Record.stepped

    def stepped_or_not(record, values):
        stepped(record, values)
        if record.step == int(step):
            raise OSError("there is no space left here")

    metrics.Record.stepped = stepped_or_not


def main() -> None:
    stage, workdir, wait = sys.argv[1:]
    if "ERROR_AT" in os.environ:
        error_at(os.environ["ERROR_AT"])
    if "SIGNAL_AT" in os.environ:
        signal_at(os.environ["SIGNAL_AT"])
    with launch.refusals():
        cluster.join(int(wait))
        train.train(config.from_json(config.Stage, json.loads(stage)), workdir)


if __name__ == "__main__":
    main()
