import signal
import sys
from dataclasses import replace

import jax
import pytest
import spine_fixture as tiny

from codellama_jax import cluster, config, launch, stop, train


def stages(size: str) -> launch.Stages:
    code = tiny.stage(steps=1_000, optim=replace(tiny.OPTIM, warmup_steps=500))
    short = replace(
        code, name="instruct", start_from="code", optim=tiny.OPTIM, steps=100, seed=len(size)
    )
    return {"code": code, "instruct": short}


def layouts(stage: config.Stage, size: str) -> dict[str, config.Layout]:
    laid_out = {"v5e:2x4": config.Layout(fsdp=8, remat="dots"), "v5e:4x4": config.Layout()}
    return laid_out if stage.name == "instruct" else {}


@pytest.fixture
def run(monkeypatch):
    """Runs the command line with these arguments; returns what was given to train()."""
    given = []
    monkeypatch.setattr(train, "train", lambda *args: given.append(args))
    monkeypatch.setattr(cluster, "join", lambda _: None)
    monkeypatch.setattr(launch, "keep_compiled", lambda _: None)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: None)  # gcsfs is not here
    monkeypatch.setattr(launch.faulthandler, "enable", lambda: None)

    def main(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
        launch.main(stages, ("7b", "13b"), "A recipe.", layouts)
        return given.pop() if given else None

    return main


CHOSEN = ("--size", "7b", "--stage", "instruct", "--workdir", "/somewhere")


def test_the_chosen_stage_is_trained_with_its_settings(run):
    stage, workdir = run(*CHOSEN, "--set", "optim.peak_lr=1e-4", "--set", "steps=50")
    assert workdir == "/somewhere"
    expected = stages("7b")["instruct"]
    assert stage == replace(expected, steps=50, optim=replace(expected.optim, peak_lr=1e-4))


def test_settings_need_not_suit_the_stages_that_are_not_trained(run):
    assert run(*CHOSEN, "--set", "steps=200")[0].steps == 200  # code warms up for 500


def test_settings_that_only_fit_together_are_set_together(run):
    stage, _ = run(*CHOSEN, "--set", "steps=2", "--set", "optim.warmup_steps=1")
    assert (stage.steps, stage.optim.warmup_steps) == (2, 1)


def test_a_stage_is_laid_out_for_a_slice_and_still_takes_settings(run):
    stage, _ = run(*CHOSEN, "--slice", "v5e:2x4", "--set", "layout.microbatches=2")
    assert stage.layout == config.Layout(fsdp=8, remat="dots", microbatches=2)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((), "error: --size is missing; there are 7b, 13b"),
        (("--size", "7b"), "error: --stage is missing; 7b has code, instruct"),
        (("--size", "7b", "--stage", "code"), "error: --workdir is missing"),
        (
            ("--size", "7b", "--stage", "chat", "--workdir", "x"),
            "error: 7b has no stage 'chat'; it",
        ),
        ((*CHOSEN, "--set", "steps"), "error: --set 'steps' is not of the form field=value"),
        ((*CHOSEN, "--set", "stepz=3"), "error: Stage has no field 'stepz'; did you mean 'steps'?"),
        ((*CHOSEN, "--set", "steps=x"), "error: steps='x' is not a whole number"),
        ((*CHOSEN, "--set", "steps=0"), "error: steps=0 must be positive"),
        (
            (*CHOSEN, "--slice", "v6e:2x2"),
            "error: 7b instruct has no layout for slice 'v6e:2x2', only for v5e:2x4, v5e",
        ),
        (
            (*CHOSEN, "--slice", "v5e:4x4"),
            "error: --slice v5e:4x4 has 16 devices, this run has 8 (cpu, processes: 1): start",
        ),
        (
            ("--size", "7b", "--stage", "code", "--workdir", "x", "--slice", "v5e:4x4"),
            "error: 7b code has no layout for slice 'v5e:4x4', only for none",
        ),
        (
            (*CHOSEN[:4], "--workdir", "gs://bucket/run"),
            "error: --workdir gs://bucket/run needs gcsfs: pip install gcsfs",
        ),
        (("--list", "--set", "a=1"), "error: Stage has no field 'a'"),
    ],
)
def test_what_cannot_be_run_is_answered_in_one_sentence(run, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(sentence)
    assert printed.count("\n") == 1


def test_every_stage_is_listed_on_one_line(run, capsys):
    assert run("--list") is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.split()] == [
        "7b", "stage", "code", "instruct", "13b", "stage", "code", "instruct",
    ]  # fmt: skip
    assert "256 k" in lines[2] and "1,000" in lines[2] and "code 100%" in lines[2]
    run("--list", "--size", "13b", "--set", "optim.peak_lr=3e-4")
    printed = capsys.readouterr().out
    assert "7b" not in printed and printed.count("0.0003") == 2


@pytest.mark.parametrize(
    "count, text",
    [(7, "7"), (4_096, "4.1 k"), (4_194_304, "4.19 M"), (500 * 10**9, "500 B"), (10**12, "1 T")],
)
def test_counts_are_short(count, text):
    assert launch._short(count) == text


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [ValueError, FloatingPointError, OSError])
def test_what_the_user_or_the_machine_did_wrong_is_one_sentence(error, capsys):
    with pytest.raises(SystemExit, match="2"):
        with launch.refusals():
            raise error("the sentence")
    assert capsys.readouterr().err == "error: the sentence\n"


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(KeyError, match="ours"):
        with launch.refusals():
            raise KeyError("ours")


def test_where_an_error_was_raised_is_shown_on_request(run):
    with pytest.raises(ValueError, match="steps='x' is not a whole number"):
        run(*CHOSEN, "--set", "steps=x", "--traceback")


@pytest.mark.parametrize(
    "error, status, said",
    [
        (stop.Stopped("saved at step 3", signal.SIGTERM), "143", "saved at step 3. To go on: "),
        (KeyboardInterrupt(), "130", "To go on: "),
    ],
)
def test_a_run_that_was_told_to_end_says_how_to_go_on(error, status, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/nano.py", "--set", "data.mix={}"])
    with pytest.raises(SystemExit, match=status):
        with launch.refusals():
            raise error
    printed = capsys.readouterr().err
    assert printed == f"{said}python recipes/nano.py --set 'data.mix={{}}'\n"


# -- processes -----------------------------------------------------------------------------------
@pytest.fixture
def joined(monkeypatch):
    """How jax.distributed.initialize was called by cluster.join in this environment."""
    calls = []

    def initialize(**how):
        calls.append({name: how[name] for name in how if name != "initialization_timeout"})
        if not how.get("num_processes"):
            raise ValueError("coordinator_address should be defined.")  # as JAX says of no cluster

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(cluster, "_line", None)
    monkeypatch.setattr(cluster.atexit, "register", lambda _: None)

    def start(**environment: str):
        for name in (*cluster.BY_HAND, "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            cluster.join(300)
        finally:
            cluster.leave()
        return calls

    return start


@pytest.mark.parametrize(
    "environment, calls",
    [
        ({}, [{}]),  # asks JAX, which finds none
        ({"SLURM_NTASKS": "1"}, []),
        ({"SLURM_NTASKS": "4"}, [{}]),
        ({"JAX_NUM_PROCESSES": "1"}, []),
        (
            {
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
            },
            [{"num_processes": 2, "process_id": 1}],
        ),
    ],
)
def test_one_of_many_processes_joins_the_others(joined, environment, calls):
    assert joined(**environment) == calls


def test_processes_started_by_hand_need_all_three_variables(joined):
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES=2 needs JAX_PROCESS_ID, too"):
        joined(JAX_NUM_PROCESSES="2")


@pytest.mark.parametrize(
    "environment, method, found",
    [
        (
            {
                "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-05],b", "SLURM_NTASKS": "8",
                "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
            },
            "slurm",
            ("node03:61447", 8, 5),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "localhost,b,c", "TPU_WORKER_ID": "2"},
            "gketpu",
            ("localhost:8482", 3, 2),
        ),
        (
            {
                "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:80",
            },
            "gketpu",
            ("localhost:8482", 4, 3),
        ),
    ],
)  # fmt: skip
def test_jax_itself_finds_the_processes_of_a_cluster(monkeypatch, environment, method, found):
    """What join leaves to JAX: it has to stay true with the next version of JAX."""
    from jax._src import cloud_tpu_init, clusters
    from jax._src.clusters import cloud_tpu_cluster

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if method == "gketpu":
        monkeypatch.delenv("TPU_PROCESS_ADDRESSES", raising=False)
        for module in (cloud_tpu_init, cloud_tpu_cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
        # asked of the machine where the environment does not say
        monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", environment.get)
    address, count, number, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 300
    )
    assert (address, count, number) == found


def test_programs_are_kept_in_the_workdir_unless_the_user_says_where(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        launch.keep_compiled(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
        launch.keep_compiled(tmp_path / "other")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
