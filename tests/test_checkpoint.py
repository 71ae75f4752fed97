import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spine_fixture as tiny

from codellama_jax import bits, checkpoint, config, lineage, optim, state, step

STAGE = tiny.stage()
TX = optim.adamw(STAGE.optim, STAGE.steps)
RECIPE = lineage.describe(STAGE, "a" * 64, "c" * 64)


@functools.cache
def trained(**axes) -> state.TrainState:
    """A state whose moments are not zero."""
    mesh = tiny.mesh(**axes)
    made = state.random_state(tiny.MODEL, TX, mesh, seed=0)
    with jax.set_mesh(mesh):
        return jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))(made)


def at(number: int, **axes) -> state.TrainState:
    return trained(**axes)._replace(step=jnp.int32(number))


def save(folder, *numbers, keep=10, recipe=RECIPE):
    with checkpoint.Checkpoints(folder, keep) as checkpoints:
        for number in numbers:
            checkpoints.save(at(number), recipe)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stage's folder with steps 3 and 12, to be read only."""
    return save(tmp_path_factory.mktemp("workdir") / "code", 3, 12)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


# -- what comes back -----------------------------------------------------------------------------
@pytest.mark.parametrize("axes", [{}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2}])
def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path, axes):
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(at(7, fsdp=2, tensor=2), RECIPE)
    abstract = state.abstract_state(tiny.MODEL, TX, tiny.mesh(**axes))
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        back = checkpoints.restore(abstract)
    assert_equal(back, at(7))
    for leaf, place in zip(jax.tree.leaves(back), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_what_is_saved_is_the_state_of_that_moment_though_its_memory_is_used_again(tmp_path):
    train_step = jax.jit(step.make_train_step(STAGE, "cpu"), donate_argnums=0)
    now = state.state_from_params(tiny.params(), tiny.MODEL, TX, tiny.mesh())
    kept = {}
    with checkpoint.Checkpoints(tmp_path, keep=10) as checkpoints:
        for number in range(1, 5):
            now, _ = train_step(now, tiny.random_batch(8))
            kept[number] = jax.tree.map(np.array, now)  # copies
            checkpoints.save(now, RECIPE)
    for number, want in kept.items():
        assert_equal(checkpoint.restore_params(tmp_path / str(number), tiny.MODEL), want.params)


def test_weights_come_back_alone_placed_and_cast(saved):
    mesh = tiny.mesh(fsdp=4, tensor=2)
    params = checkpoint.restore_params(saved, tiny.MODEL, mesh, jnp.bfloat16)
    places = state.param_shardings(tiny.MODEL, mesh)
    for leaf, place, want in zip(
        *map(jax.tree.leaves, (params, places, at(0).params)), strict=True
    ):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        np.testing.assert_array_equal(leaf, want.astype(jnp.bfloat16))


def test_a_folder_tells_its_model_weights_and_tokenizer(tmp_path):
    folder = save(tmp_path / "code", 5)
    model, params, tokenizer = checkpoint.load(folder)
    assert (model, tokenizer) == (tiny.MODEL, None)
    assert_equal(params, at(0).params)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    assert checkpoint.load(folder / "5")[2] == folder / "tokenizer.model"


def test_the_recipe_beside_the_weights_says_how_they_were_made(saved):
    recipe = checkpoint.read_recipe(saved)
    assert recipe["model"] == tiny.MODEL
    assert config.from_json(config.Stage, recipe["stage"]) == STAGE
    assert recipe["tokenizer_fingerprint"] == "a" * 64
    assert set(recipe["versions"]) == {"jax", "flax", "optax", "orbax-checkpoint"}
    assert set(recipe["versions"].values()).isdisjoint({"not installed"})
    on_disk = json.loads((saved / "12" / "recipe" / "metadata").read_text())
    assert on_disk["model"] == config.to_json(tiny.MODEL)


# -- which checkpoint ----------------------------------------------------------------------------
def test_the_newest_is_found_by_number_not_by_spelling(saved):
    assert checkpoint.find(saved) == saved / "12"
    assert checkpoint.find(saved / "3") == saved / "3"
    with checkpoint.Checkpoints(saved, keep=10) as checkpoints:
        assert checkpoints.latest() == 12


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]


def test_saving_a_step_twice_writes_it_once(tmp_path):
    save(tmp_path, 4, 4)
    before = (tmp_path / "4").stat().st_mtime_ns
    save(tmp_path, 4)
    assert (tmp_path / "4").stat().st_mtime_ns == before


def test_a_folder_may_be_named_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/code", 4)
    assert checkpoint.find("runs/code") == tmp_path / "runs" / "code" / "4"
    assert_equal(checkpoint.load("runs/code")[1], at(0).params)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.find("~/runs/code/4") == tmp_path / "runs" / "code" / "4"
    assert str(checkpoint.absolute("gs://bucket/run")) == "gs://bucket/run"


def test_where_there_is_none_what_is_there_is_said(tmp_path, saved):
    with pytest.raises(ValueError, match="nothing: there is no such folder"):
        checkpoint.find(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no checkpoint in .*; it holds the stages code"):
        checkpoint.load(saved.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint.load(tmp_path / "file")
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path)


# -- half-written and damaged --------------------------------------------------------------------
def test_what_a_killed_run_left_half_written_is_not_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "3", tmp_path / "9.orbax-checkpoint-tmp")
    assert checkpoint.find(tmp_path) == tmp_path / "3"
    assert not checkpoint.any_step(tmp_path / "9.orbax-checkpoint-tmp")
    save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "3"]


@pytest.mark.slow
def test_a_run_killed_while_it_writes_leaves_whole_checkpoints_only(tmp_path):
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest
        import test_checkpoint as t
        from codellama_jax import checkpoint
        with checkpoint.Checkpoints({str(tmp_path)!r}, keep=1_000) as checkpoints:
            first = (checkpoints.latest() or 0) + 1
            t.at(0)
            print("ready", flush=True)
            for number in range(first, 10_000):
                checkpoints.save(t.at(number), t.RECIPE)
    """
    for seconds in (0.3, 0.55, 0.8):
        run = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
        )
        assert run.stdout.readline() == b"ready\n"
        time.sleep(seconds)
        while not checkpoint.any_step(tmp_path):
            assert run.poll() is None
            time.sleep(0.01)
        run.kill()
        run.communicate()
        for folder in tmp_path.iterdir():
            if checkpoint.is_whole(folder):
                assert_equal(checkpoint.restore_params(folder, tiny.MODEL), at(0).params)
    assert checkpoint.any_step(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [20_000, 2_000])  # bytes: less than the largest weight takes
def test_a_full_disk_is_told_in_one_sentence_and_leaves_what_was_whole(tmp_path, limit):
    save(tmp_path, 3)
    program = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest
        import test_checkpoint as t
        from codellama_jax import launch
        t.at(0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing too much is an error, not the end
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        with launch.refusals():
            t.save({str(tmp_path)!r}, 4, 5)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert run.returncode == 2
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"a checkpoint could not be written to {tmp_path}; " in errors[0]
    assert "File too large" in errors[0]
    assert checkpoint.find(tmp_path) == tmp_path / "3"
    assert_equal(checkpoint.load(tmp_path)[1], at(0).params)


@pytest.mark.parametrize("settings", ["", " [os_error_code='28'] [tensorstore_spec='{1: 2}']"])
def test_why_a_checkpoint_was_not_written_is_said_whatever_stands_behind_it(settings):
    with pytest.raises(OSError, match=r"Reason: \.\.\..*file 19: No space left on device$"):
        with checkpoint._writable("run/code"):
            written = "Error writing " + 30 * '"d/2c1ae": ' + "Failed to write 9 bytes to file 19: "
            raise ValueError(f"{written}No space left on device{settings}\nand more")


def damaged(saved, tmp_path, what) -> Path:
    """A copy of a checkpoint with every file below `what` cut in half."""
    folder = shutil.copytree(saved / "3", tmp_path / "code" / "3")
    for path in [folder / what, *(folder / what).rglob("*")]:
        if path.is_file() and path.stat().st_size:
            os.truncate(path, path.stat().st_size // 2)
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "what", ["params/manifest.ocdbt", "params/_METADATA", "params/d", "recipe/metadata"]
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(saved, tmp_path, what):
    folder = damaged(saved, tmp_path, what)
    with pytest.raises(ValueError, match="/code/3 cannot be read; .*remove that folder") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stage_does_not_go_on_from_damaged_moments(saved, tmp_path):
    damaged(saved, tmp_path, "opt_state/manifest.ocdbt")
    abstract = state.abstract_state(tiny.MODEL, TX, tiny.mesh())
    with checkpoint.Checkpoints(tmp_path / "code", keep=10) as checkpoints:
        with pytest.raises(ValueError, match="/code/3 cannot be read"):
            checkpoints.restore(abstract)
    checkpoint.load(tmp_path / "code")  # the weights are sound


# -- bits that changed ---------------------------------------------------------------------------
def test_checksums_do_not_depend_on_the_mesh_and_see_one_bit():
    trees = [at(3, **axes)._asdict() for axes in ({}, {"fsdp": 4, "tensor": 2}, {"data": 2})]
    sums = [bits.checksums(tree) for tree in trees]
    assert sums[0] == sums[1] == sums[2]
    one = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    other, swapped = (one["w"].copy() for _ in range(2))
    other.view(np.uint32)[1, 2] ^= 1
    swapped[0, 1], swapped[1, 0] = one["w"][1, 0], one["w"][0, 1]
    assert len({bits.checksums({"w": w})["w"] for w in (one["w"], other, swapped)}) == 3
    half = {"w": one["w"].astype(jnp.bfloat16), "count": np.int32(7)}
    assert set(bits.checksums(half)) == {"w", "count"}


def test_a_checkpoint_with_other_bits_than_were_written_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved / "3", tmp_path / "code" / "3")
    path = folder / "recipe" / "metadata"
    recipe = json.loads(path.read_text())
    recipe["checksums"]["params.norm"] ^= 1
    recipe["checksums"]["opt_state.1.mu.norm"] ^= 1
    path.write_text(json.dumps(recipe))
    for dtype in (None, jnp.bfloat16):  # compared before it is rounded
        refusal = "code/3 is damaged: params.norm hold.*restore it from"
        with pytest.raises(ValueError, match=refusal):
            checkpoint.load(folder, dtype=dtype)
    abstract = state.abstract_state(tiny.MODEL, TX, tiny.mesh())
    with checkpoint.Checkpoints(tmp_path / "code", keep=10) as checkpoints:
        with pytest.raises(ValueError, match="damaged: opt_state.1.mu.norm, params.norm hold"):
            checkpoints.restore(abstract)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_weights_are_read_without_a_warning(saved, dtype, monkeypatch):
    said = []
    absl = logging.getLogger("absl")  # Orbax's; not a child of the root
    monkeypatch.setattr(absl, "log", lambda level, *args, **_: said.append((level, args)))
    checkpoint.load(saved / "3", dtype=dtype)
    assert not [args for level, args in said if level >= logging.WARNING]
