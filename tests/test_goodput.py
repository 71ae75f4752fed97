"""Where the time of a stage went, over several calls, some of them killed."""

import pytest

from codellama_jax import goodput
from codellama_jax.goodput import Call


@pytest.fixture
def time(monkeypatch):
    """A clock that stands still until it is told to go on."""
    now = [1_000.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])

    def passes(seconds: float):
        now[0] += seconds

    return passes


def call(folder, time, first: int, last: int, *, killed: bool = False):
    """A call of 1 s of start, 2 s of compiling and 4 s a step, with a checkpoint of 1 s behind."""
    clock = goodput.Clock(folder)
    clock.__enter__()
    time(1.0)
    clock.starts(first)
    for step in range(first + 1, last + 1):
        if step == first + 1:
            with clock.spends("compile"):
                time(2.0)
        time(4.0)
        clock.ended(step)
    if not killed:
        with clock.spends("checkpoint"):
            time(1.0)
        clock.__exit__()


def test_what_a_call_spends_adds_up_to_its_time(tmp_path, time):
    call(tmp_path, time, 0, 5)
    (read,) = goodput.read(tmp_path)
    assert (read.first_step, read.last_step, read.seconds) == (0, 5, 24.0)
    assert (read.spent["start"], read.spent["compile"], read.spent["checkpoint"]) == (1, 2, 1)
    assert read.training == 20.0
    total = goodput.summary([read])
    assert (total.calls, total.seconds, total.lost_steps) == (1, 24.0, 0)
    assert total.share == pytest.approx(20 / 24)
    assert sum(total.spent.values()) == pytest.approx(total.seconds)


def test_steps_that_are_done_again_are_lost(tmp_path, time):
    call(tmp_path, time, 0, 11, killed=True)  # the newest whole checkpoint is that of step 4
    call(tmp_path, time, 4, 10)
    killed, whole = goodput.read(tmp_path)
    assert (killed.first_step, killed.last_step) == (0, 9)  # of its last seconds is no record
    total = goodput.summary([killed, whole])
    assert (total.calls, total.lost_steps) == (2, 5)
    assert total.spent["lost"] == pytest.approx(20.0)
    assert total.spent["steps"] == pytest.approx(10 * 4.0)
    assert sum(total.spent.values()) == pytest.approx(total.seconds)
    assert "5 steps done again" in goodput.words(total) and "in 2 calls" in goodput.words(total)
    (tmp_path / "run").mkdir()
    (tmp_path / "goodput.json").rename(tmp_path / "run" / "goodput.json")
    assert goodput.seconds(tmp_path, ["run", "absent"]) == total.seconds


def test_a_call_that_ended_before_its_first_step_loses_no_steps():
    spent = dict.fromkeys(goodput.KINDS, 0.0)
    calls = [
        Call(0, 8, 8.0, spent),
        Call(0, 0, 3.0, spent | {"start": 3.0}),
        Call(8, 9, 1.0, spent),
    ]
    total = goodput.summary(calls)
    assert (total.lost_steps, total.spent["lost"], total.seconds) == (0, 0.0, 12.0)


def test_a_call_that_fails_at_its_start_is_all_start(tmp_path, time):
    with pytest.raises(ValueError), goodput.Clock(tmp_path):
        time(5.0)
        raise ValueError
    assert goodput.summary(goodput.read(tmp_path)).spent["start"] == 5.0


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    with goodput.Clock(tmp_path, writes=False) as clock:
        clock.starts(3)
    assert goodput.read(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_call_that_is_killed_at_once_counts(tmp_path, time):
    call(tmp_path, time, 0, 1, killed=True)
    call(tmp_path, time, 0, 5)
    total = goodput.summary(goodput.read(tmp_path))
    assert (total.calls, total.lost_steps) == (2, 0)
    assert total.spent["start"] == 2.0
