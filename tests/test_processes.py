"""Many processes, for real: what they train, how they end, and what the next ones find."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import spine_fixture as tiny
import stage_process as own
from stage_process import assert_equal, code_stage, ended, lines, new_workdir, weights

from codellama_jax import agreement, checkpoint, goodput, stop, train, watchdog

STEPS = 30


def stage(**changes):
    plain = replace(code_stage().data, infilling_rate=0.0)  # a program less to compile
    settings = {"steps": STEPS, "save_every": 4, "eval_every": 15, "data": plain}
    return code_stage(**settings | changes)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder for compiled programs, so that processes need not compile what others did."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The stage trained by one process without interruption; to be read only."""
    workdir = new_workdir(tmp_path_factory.mktemp("alone") / "workdir")
    train.train(stage(), workdir)
    return workdir


def start(number: int, what, workdir, programs, *, devices=2, only=None, wait=own.TIMEOUT, **told):
    """`number` processes with `devices` each; returns them with their logs, to be read later.

    only: the processes that are started. told: environment of one of them, as p0={...}.
    """
    address, begun, logs = f"localhost:{own.free_ports()}", [], []
    flags = os.environ["XLA_FLAGS"]  # of two that contradict each other the last counts
    for process in range(number) if only is None else only:
        environment = {
            "JAX_NUM_PROCESSES": str(number),
            "JAX_PROCESS_ID": str(process),
            "JAX_COORDINATOR_ADDRESS": address,
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
            **told.get(f"p{process}", {}),
        }
        logs.append(workdir.parent / f"log-{len(list(workdir.parent.iterdir()))}-{process}")
        chosen = what[process] if isinstance(what, list) else what
        begun.append(own.start(chosen, workdir, programs, logs[-1], wait, **environment))
    return begun, logs


def texts(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3_000:]}" for log in logs)


def assert_as_alone(folder: Path, alone: Path):
    """The same data exactly, the same losses up to the order of float32 sums."""
    for got, want in zip(lines(folder), lines(alone / "code"), strict=True):
        assert got["step"] == want["step"]
        assert got.get("tokens") == want.get("tokens")
        if "loss" in want:
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)


# -- one process ---------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_signal_saves_first_and_the_run_goes_on_bit_for_bit(alone, programs, tmp_path):
    workdir, log = new_workdir(tmp_path / "workdir"), tmp_path / "log"
    first = own.start(stage(), workdir, programs, log, SIGNAL_AT="6:SIGTERM")
    assert ended([first]) == [128 + signal.SIGTERM], log.read_text()[-3_000:]
    step = int(checkpoint.find(workdir / "code").name)
    assert 6 <= step < STEPS
    last = next(line for line in log.read_text().splitlines() if "ends at step" in line)
    assert f"ends at step {step} of {STEPS} by SIGTERM; its checkpoint is {workdir}" in last
    assert "To go on: python " in last and "stage_process.py" in last
    assert ended([own.start(stage(), workdir, programs, log)]) == [0], log.read_text()[-3_000:]
    assert lines(workdir / "code") == lines(alone / "code")
    assert_equal(weights(workdir / "code"), weights(alone / "code"))
    calls = goodput.read(workdir / "code")
    assert [(call.first_step, call.last_step) for call in calls] == [(0, step), (step, STEPS)]


# -- many ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_what_four_processes_write_one_and_two_go_on_from(alone, programs, tmp_path):
    """All train what one does. Each but the last is told to stop by a signal to one of them."""
    written, copied = tmp_path / "written" / "workdir", tmp_path / "copied" / "workdir"
    interrupted(new_workdir(written), 4, 3, programs)
    shutil.copytree(written, copied)
    interrupted(copied, 2, 17, programs)
    for workdir in (written, copied):
        log = workdir.parent / "log"
        assert ended([own.start(stage(), workdir, programs, log)]) == [0], log.read_text()[-3_000:]
        assert_as_alone(workdir / "code", alone)


def interrupted(workdir: Path, number: int, at: int, programs: str) -> None:
    """Trains on `number` processes; a signal to the last, behind step `at`, stops them all."""
    told = {f"p{number - 1}": {"SIGNAL_AT": f"{at}:SIGTERM"}}
    processes, logs = start(number, stage(), workdir, programs, **told)
    assert ended(processes) == [128 + signal.SIGTERM] * number, texts(logs)
    step = int(checkpoint.find(workdir / "code").name)
    assert at <= step < STEPS
    assert all(f"ends at step {step} of {STEPS} by SIGTERM" in x.read_text() for x in logs)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_restart_is_bit_for_bit(alone, programs, tmp_path):
    """A row is split over both processes: they read the same rows."""
    split = stage(layout={"tensor": 2})
    whole, killed = (new_workdir(tmp_path / name / "workdir") for name in ("whole", "killed"))
    processes, logs = start(2, split, whole, programs, devices=1)
    assert ended(processes) == [0, 0], texts(logs)
    assert_as_alone(whole / "code", alone)
    told = {"p1": {"SIGNAL_AT": "10:SIGKILL"}}
    processes, logs = start(2, split, killed, programs, devices=1, **told)
    survivor, victim = ended(processes)
    assert victim == -signal.SIGKILL and survivor not in (0, -signal.SIGKILL), texts(logs)
    assert "process 1 of 2 on " in logs[0].read_text(), texts(logs)
    assert "ended without a word. The last checkpoint is sound" in logs[0].read_text()
    compiled = steps_in(programs)
    processes, logs = start(2, split, killed, programs, devices=1)
    assert ended(processes) == [0, 0], texts(logs)
    assert lines(killed / "code") == lines(whole / "code")
    assert_equal(weights(killed / "code"), weights(whole / "code"))
    assert goodput.summary(goodput.read(killed / "code")).calls == 2
    assert compiled and steps_in(programs) == compiled  # the restart found the step in the cache


def steps_in(programs: str) -> set[str]:
    """The compiled training steps in JAX's cache."""
    return {path.name for path in Path(programs).glob("jit_train_step-*-cache")}


@pytest.mark.slow
def test_a_process_that_fails_by_itself_ends_the_others_with_its_reason(programs, tmp_path):
    workdir = new_workdir(tmp_path / "workdir")
    split = stage(layout={"tensor": 2})
    processes, logs = start(2, split, workdir, programs, devices=1, p1={"ERROR_AT": "5"})
    assert 0 not in ended(processes), texts(logs)
    assert "error: there is no space left here" in logs[1].read_text(), texts(logs)
    assert "process 1 of 2 on " in logs[0].read_text(), texts(logs)


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_host_that_is_missing_is_named(programs, tmp_path):
    workdir = new_workdir(tmp_path / "workdir")
    processes, logs = start(3, stage(), workdir, programs, only=(0, 2), wait=40)
    assert ended(processes) == [1, 1], texts(logs)
    said = logs[0].read_text()
    assert "processes did not arrive within 40 s: 1" in said and "There are process 0 on" in said


@pytest.mark.slow
def test_processes_that_differ_stop_and_say_in_what(programs, tmp_path):
    workdir = new_workdir(tmp_path / "workdir")
    other = stage()
    other = replace(
        other, optim=replace(other.optim, peak_lr=0.5), data=replace(other.data, seed=3)
    )
    processes, logs = start(2, [stage(), other], workdir, programs, devices=1)
    assert set(ended(processes)) <= {1, 2}, texts(logs)
    assert any("error: the processes of this run do not agree: " in x.read_text() for x in logs)
    for log in logs:
        assert "stage.optim.peak_lr is 0.5 on " in log.read_text(), texts(logs)
    assert not (workdir / "code").exists()


# -- in this process -----------------------------------------------------------------------------
def test_a_second_signal_ends_at_once_though_the_main_thread_is_busy():
    text = """
        import hashlib, sys
        sys.path.insert(0, sys.argv[1])
        from codellama_jax import stop
        with stop.Signals():
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # runs no Python until it is done
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), str(Path(__file__).parents[1])],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGTERM)
        while "SIGTERM: ends after this step, with a checkpoint" not in run.stderr.readline():
            assert run.poll() is None  # others may say something, too
        run.send_signal(signal.SIGINT)
        assert run.wait(own.TIMEOUT) == 128 + signal.SIGINT
        assert "SIGINT again: ends at once" in run.stderr.read()
    finally:
        run.kill()
        run.communicate()


def test_what_one_process_is_told_all_learn_one_step_later():
    vote = stop.Vote(tiny.mesh(fsdp=4, tensor=2))
    assert [vote(told) for told in (0, 15, 0, 2, 0)] == [0, 0, 15, 0, 2]


def test_the_stacks_of_a_step_that_does_not_end_are_shown(capfd):
    seen, until = "", time.monotonic() + own.TIMEOUT
    with watchdog.Watchdog("code", 6, seconds=0.2) as dog:
        dog.ended(7)  # on a busy machine the step after 6 may have been reported before
        while "test_the_stacks_of_a_step" not in _after_7(seen) and time.monotonic() < until:
            time.sleep(0.05)
            seen += capfd.readouterr().err
    assert "test_the_stacks_of_a_step" in _after_7(seen)
    assert "process 0 of 1 on " in _after_7(seen)


def _after_7(seen: str) -> str:
    return seen.partition("stage 'code': the step after 7 has not ended for ")[2]


def test_steps_that_end_in_time_are_not_reported(capfd):
    with watchdog.Watchdog("code", 0, seconds=3_600) as dog:
        for step in range(3):
            dog.ended(step)
    assert capfd.readouterr().err == ""


def test_what_processes_say_otherwise_than_the_first_is_listed():
    hosts = ["a", "b", "c"]
    said = [{"jax": "1", "code": "x"}, {"jax": "2", "code": "x"}, {"jax": "1"}]
    assert agreement.differing(hosts, said) == [
        "code is None on c (process 2), x on a (process 0)",
        "jax is 2 on b (process 1), 1 on a (process 0)",
    ]
    assert agreement.differing(hosts, [said[0]] * 3) == []
    broken = [said[0], {"": "there is no corpus"}, said[0]]
    assert agreement.differing(hosts, broken) == ["process 1 on b: there is no corpus"]
