"""The whole system on a tiny corpus: stages, kills, resumes, refusals."""

import math
import os
import random
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import corpus_fixture
import jax
import numpy as np
import pytest
import spine_fixture as tiny
from stage_process import (
    KEEP_PROGRAMS,
    assert_equal,
    code_stage,
    lines,
    new_workdir,
    start,
    weights,
)

from codellama_jax import checkpoint, config, lineage, metrics, state, train
from codellama_jax.data import mix

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Programs that were compiled once in this file, kept: stages run many times here."""
    folder = str(tmp_path_factory.mktemp("programs"))
    before = {name: getattr(jax.config, name) for name in KEEP_PROGRAMS}
    for name, value in (KEEP_PROGRAMS | {"jax_compilation_cache_dir": folder}).items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def long_stage(**changes) -> config.Stage:
    code = code_stage()
    settings = {
        "name": "long_context",
        "start_from": "code",
        "model": replace(code.model, rope_theta=1e6),
        "data": replace(code.data, seq_len=128, batch_tokens=8 * 128, infilling_rate=0.0),
        "optim": replace(code.optim, peak_lr=1e-12, weight_decay=0.0),
        "steps": 3,
        "log_every": 2,
    }
    return replace(code, **settings | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workdir in which both stages were trained without interruption; to be read only."""
    workdir = new_workdir(tmp_path_factory.mktemp("finished") / "workdir")
    for stage in (code_stage(), long_stage()):
        train.train(stage, workdir)
    return workdir


# -- two stages ----------------------------------------------------------------------------------
def test_a_stage_learns_and_says_so(finished):
    steps = [line for line in lines(finished / "code") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[0]["loss"] == pytest.approx(math.log(512), rel=0.1)
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["learning_rate"] == pytest.approx(1e-2 / 30)
    evaluations = [line for line in lines(finished / "code") if "heldout" in line]
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    assert set(evaluations[0]["heldout"]) == {"code", "code_language", "language"}
    assert {"psm", "spm"} <= set(evaluations[0]["infilling"])
    assert evaluations[-1]["heldout"]["code"] < 0.7 * evaluations[0]["heldout"]["code"]


def test_tokens_by_corpus_add_up_to_what_was_read(finished):
    stage = code_stage()
    read = dict.fromkeys(mix.names(stage.data), 0)
    batches = mix.batches(
        stage.data, corpus_fixture.prepared().folder, corpus_fixture.tokenizer(), steps=12
    )
    for batch in batches:
        for number, name in enumerate(read):
            read[name] += int(batch["loss_mask"][batch["corpus"] == number].sum())
    assert [line["tokens"] for line in lines(finished / "code") if "tokens" in line][-1] == read
    assert 0.9 * stage.tokens < sum(read.values()) < stage.tokens


def test_the_second_stage_starts_from_the_weights_of_the_first(finished):
    first, second = weights(finished / "code"), weights(finished / "long_context")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)  # its learning rate is next to nothing
    logged = lines(finished / "long_context")
    assert [line["step"] for line in logged] == [0, 2, 3, 3]
    assert logged[1]["learning_rate"] == pytest.approx(1e-12)  # its own schedule, from its start


def test_a_stage_leaves_all_that_the_next_program_needs(finished):
    for stage in (code_stage(), long_stage()):
        folder = finished / stage.name
        recipe = checkpoint.read_recipe(folder)
        assert recipe["model"] == stage.model
        assert config.from_json(config.Stage, recipe["stage"]) == stage
        assert recipe["tokenizer_fingerprint"] == corpus_fixture.tokenizer().fingerprint
        kept = (folder / "tokenizer.model").read_bytes()
        assert kept == Path(corpus_fixture.tokenizer().path).read_bytes()
        assert not list(folder.rglob("*tmp*"))
    assert sorted(p.name for p in (finished / "code").iterdir() if p.name.isdigit()) == ["10", "12"]


def test_a_finished_stage_is_not_trained_again(finished):
    before = (finished / "code" / "metrics.jsonl").read_bytes()
    assert_equal(train.train(code_stage(), finished), weights(finished / "code"))
    assert (finished / "code" / "metrics.jsonl").read_bytes() == before


# -- interruptions -------------------------------------------------------------------------------
class Interrupted(Exception):
    pass


def interrupt(monkeypatch, at_step: int):
    """Makes the next run end abruptly when it has dispatched `at_step`."""
    stepped = metrics.Record.stepped

    def stepped_or_not(record, values):
        stepped(record, values)
        if record.step == at_step:
            raise Interrupted

    monkeypatch.setattr(metrics.Record, "stepped", stepped_or_not)


@pytest.mark.parametrize("at_step", [3, 8])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch, at_step):
    workdir = new_workdir(tmp_path / "workdir")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, at_step)
        train.train(code_stage(), workdir)
    train.train(code_stage(), workdir)
    assert lines(workdir / "code") == lines(finished / "code")
    assert_equal(weights(workdir / "code"), weights(finished / "code"))


@pytest.mark.slow
def test_a_stage_goes_on_on_other_devices(finished, tmp_path, monkeypatch):
    workdir = new_workdir(tmp_path / "workdir")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 8)
        train.train(code_stage(), workdir)
    train.train(code_stage(layout={"data": 2, "tensor": 2, "microbatches": 2}), workdir)
    for got, want in zip(lines(workdir / "code"), lines(finished / "code"), strict=True):
        assert got["step"] == want["step"]
        if "loss" in want:
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
            assert got["tokens"] == want["tokens"]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    finished, tmp_path, compiled_programs
):
    stage = replace(code_stage(), save_every=2, keep_checkpoints=3)
    workdir, log = new_workdir(tmp_path / "workdir"), tmp_path / "log"
    rng = random.Random(time.time_ns())
    whole = len(lines(finished / "code"))
    for _ in range(4):
        run = start(stage, workdir, compiled_programs, log)
        goal = _progress(workdir) + rng.randint(1, 3)
        while run.poll() is None and _progress(workdir) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        run.kill()
        run.wait()
        print("killed after", _progress(workdir), "of", whole, "lines")
    run = start(stage, workdir, compiled_programs, log)
    assert run.wait(900) == 0, log.read_text()[-3_000:]
    assert lines(workdir / "code") == lines(finished / "code")
    assert_equal(weights(workdir / "code"), weights(finished / "code"))
    assert not list((workdir / "code").rglob("*tmp*"))


def _progress(workdir: Path) -> int:
    path = workdir / "code" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# -- numbers that are not finite -----------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_the_stage_and_is_not_kept(finished, tmp_path):
    workdir = new_workdir(tmp_path / "workdir")
    wild = replace(code_stage().optim, peak_lr=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"stage 'code': loss .* at step [23]\b"):
        train.train(replace(code_stage(), optim=wild, save_every=3, eval_every=100), workdir)
    assert not [p for p in (workdir / "code").iterdir() if p.name.isdigit()]
    assert all(math.isfinite(x["loss"]) for x in lines(workdir / "code") if "loss" in x)


# -- refusals ------------------------------------------------------------------------------------
def refused(stage, workdir, *parts):
    with pytest.raises(ValueError, match="".join(f"(?=.*{part})" for part in parts)) as error:
        train.train(stage, workdir)
    assert "\n" not in str(error.value)


def test_a_workdir_made_by_another_recipe_is_refused(finished):
    other = replace(code_stage(), optim=replace(code_stage().optim, peak_lr=0.5))
    refused(other, finished, "code was made by another recipe: optim.peak_lr was 0.01, now 0.5")


def test_a_stage_whose_parent_is_missing_or_other_is_refused(finished):
    refused(
        replace(long_stage(), name="next", start_from="python"),
        finished,
        "'next' starts from 'python', but .*python holds no checkpoint: train that stage first",
    )
    wider = replace(long_stage().model, ffn_dim=160)
    refused(
        replace(long_stage(), name="next", model=wider),
        finished,
        "'next' cannot start from .*code: ffn_dim is 96 there, 160 here",
    )


def test_a_parent_that_was_interrupted_is_refused_unless_its_step_is_named(finished, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "code" / str(code_stage().steps))
    refused(
        replace(long_stage(), name="next"),
        workdir,
        f"code is at step [0-9]+ of {code_stage().steps}: train it to its end, or start from that "
        "step with start_from=code/",
    )


def test_a_stage_may_start_from_one_step_of_another(finished, tmp_path):
    early = replace(long_stage(), name="early", start_from="code/10")
    recipe = lineage.describe(early, corpus_fixture.tokenizer().fingerprint)
    with checkpoint.Checkpoints(tmp_path / "early", keep=1) as checkpoints:
        mesh = tiny.mesh(fsdp=8)
        got = train.first_state(early, finished, mesh, checkpoints, recipe)
    want = checkpoint.restore_params(finished / "code" / "10", early.model)
    assert_equal(got.params, want)
    assert not np.array_equal(want["norm"], weights(finished / "code")["norm"])


def test_another_tokenizer_is_refused_and_the_one_beside_the_weights_stays(finished, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(finished / "code", workdir / "code")
    ours = (workdir / "code" / "tokenizer.model").read_bytes()
    other = _with_other_scores(ours)
    (workdir / "tokenizer.model").write_bytes(other)
    refused(code_stage(), workdir, "tokenizer")
    assert (workdir / "code" / "tokenizer.model").read_bytes() == ours


def _with_other_scores(model: bytes) -> bytes:
    """The same pieces in another order of merging."""
    from sentencepiece import sentencepiece_model_pb2 as spm

    proto = spm.ModelProto.FromString(model)
    proto.pieces[300].score, proto.pieces[301].score = (
        proto.pieces[301].score,
        proto.pieces[300].score,
    )
    return proto.SerializeToString()


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"model": {"vocab_size": 520}}, ("has 512 pieces", "vocab_size=520")),
        ({"layout": {"microbatches": 2}}, ("4 rows per microbatch", "= 8 devices", "batch_tokens")),
        ({"layout": {"tensor": 8}}, ("wk has 2 kv_heads", "8 devices of mesh axis 'tensor'")),
        ({"layout": {"attention": "splash"}}, ("splash", "does not run on cpu")),
        ({"profile_from": 10}, ("profile_from=10", "steps=12", "1 to 9")),
        ({"profile_from": 0}, ("profile_from=0", "1 to 9")),
        ({"data": {"corpus": "nowhere"}}, ("nowhere",)),
        ({"data": {"tokenizer": "nowhere.model"}}, ("nowhere.model",)),
    ],
)
def test_settings_that_contradict_each_other_or_the_machine_are_refused(tmp_path, change, parts):
    stage = code_stage()
    for name, fields in change.items():
        value = replace(getattr(stage, name), **fields) if isinstance(fields, dict) else fields
        stage = replace(stage, **{name: value})
    refused(stage, new_workdir(tmp_path / "workdir"), *parts)


def test_a_stage_of_one_step_is_allowed():
    one = code_stage(steps=1, optim=replace(tiny.OPTIM, warmup_steps=0))
    train.check_fits(one, corpus_fixture.tokenizer(), tiny.mesh(fsdp=8))


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    workdir = new_workdir(tmp_path / "workdir")
    (workdir / "code").write_text("a file where the folder should be")
    refused(code_stage(), workdir, "cannot write to .*code: File exists")


def test_a_read_only_workdir_is_refused():
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as workdir:
        os.chmod(workdir, 0o555)
        try:
            if root:
                os.seteuid(65_534)  # nobody: root may write anywhere
            with pytest.raises(ValueError, match="cannot write to .*code: Permission denied"):
                train.prepare_folder(checkpoint.epath.Path(workdir) / "code")
        finally:
            if root:
                os.seteuid(0)
            os.chmod(workdir, 0o755)


# -- profile -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "begins, first, calls",
    [
        (0, 2, ["start 2", "stop 5"]),
        (1, 2, ["start 2", "stop 5"]),
        (2, 2, []),
        (3, 2, []),
        (0, -1, []),
    ],
)
def test_three_steps_are_profiled_or_none(monkeypatch, tmp_path, begins, first, calls):
    seen, now = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: seen.append(f"start {now}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(f"stop {now}"))
    stage = code_stage(profile_from=first)
    for now in range(begins + 1, stage.steps + 1):
        train.profile(stage, tmp_path, begins, now, state.TrainState(np.int32(0), {}, {}))
    assert seen == calls
