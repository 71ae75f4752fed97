"""train(stage, workdir): one stage, from what lies in the workdir to its last checkpoint."""

import contextlib
import signal

import jax
from etils import epath

from codellama_jax import (
    agreement,
    checkpoint,
    cluster,
    compiler_options,
    config,
    goodput,
    lineage,
    optim,
    sharding,
    state,
    step,
    stop,
    watchdog,
    whole,
)
from codellama_jax.config import check
from codellama_jax.data import corpus, mix, storage
from codellama_jax.evals import heldout
from codellama_jax.metrics import Record
from codellama_jax.tokenizer import Tokenizer


def train(stage: config.Stage, workdir: epath.PathLike) -> state.Params:
    """Trains `stage` in <workdir>/<stage.name> and returns its last weights.

    Raises ValueError for a workdir, corpus, tokenizer or parent that does not fit the stage,
    FloatingPointError when the loss stops being finite, and stop.Stopped after a signal.
    """
    workdir = checkpoint.absolute(workdir)
    folder, corpus_dir = workdir / stage.name, storage.beside(workdir, stage.data.corpus)
    agreement.compare(lambda: identity(stage, workdir))
    writes = jax.process_index() == 0

    # -- mesh, tokenizer, workdir --------------------------------------------------------------
    mesh = sharding.make_mesh(stage.layout)
    cluster.introduce(mesh)
    platform = mesh.devices.flat[0].platform
    tokenizer = Tokenizer(workdir / stage.data.tokenizer)
    check_fits(stage, tokenizer, mesh)
    prepare_folder(folder)

    with contextlib.ExitStack() as opened:
        clock = opened.enter_context(goodput.Clock(folder, writes))
        checkpoints = checkpoint.Checkpoints(folder, stage.keep_checkpoints)
        opened.push(lambda *error: close(checkpoints, clock, *error))

        # -- state ---------------------------------------------------------------------------
        recipe = lineage.describe(
            stage, tokenizer.fingerprint, corpus.open(corpus_dir, tokenizer).fingerprint
        )
        train_state = first_state(stage, workdir, mesh, checkpoints, recipe)
        keep_tokenizer(tokenizer, folder)
        start = int(train_state.step)
        if start == stage.steps:
            clock.writes = False
            if writes:
                print(f"{stage.name:<13} is done: {start:,} steps, in {folder}", flush=True)
            return train_state.params

        # -- data ----------------------------------------------------------------------------
        index, count = cluster.share(mesh)
        batches = mix.batches(
            stage.data,
            corpus_dir,
            tokenizer,
            steps=stage.steps,
            start_step=start,
            process_index=index,
            process_count=count,
        )
        judge = heldout.Judge(stage, corpus_dir, tokenizer, mesh)

        # -- loop ----------------------------------------------------------------------------
        train_step = jax.jit(
            step.make_train_step(stage, platform),
            donate_argnums=0,
            compiler_options=compiler_options.of_device(
                mesh.devices.flat[0].device_kind, stage.model.dim
            ),
        )
        record = opened.enter_context(Record(folder, stage, start, list(mesh.devices.flat)))
        opened.enter_context(jax.set_mesh(mesh))
        signals, vote = opened.enter_context(stop.Signals()), stop.Vote(mesh)
        dog = opened.enter_context(watchdog.Watchdog(stage.name, start, stage.stuck_after))
        record.tell(opening(stage, mesh, start))
        clock.starts(start)
        if start == 0:
            evaluate(judge, train_state.params, record, clock)
        for now in range(start + 1, stage.steps + 1):
            with clock.spends("data"):
                host_batch = next(batches)
            profile(stage, folder, start, now, train_state)
            batch = sharding.global_batch(host_batch, mesh)
            with clock.spends("compile") if now == start + 1 else contextlib.nullcontext():
                train_state, values = train_step(train_state, batch)
            record.stepped(values)
            last, told = now == stage.steps, told_to_stop(signals, vote)
            due = now % stage.save_every == 0 or told
            if last or due or now % stage.eval_every == 0:
                record.flush()  # a state whose loss was not finite is never kept
            if last or now % stage.eval_every == 0:
                evaluate(judge, train_state.params, record, clock)
            if last or due:
                with clock.spends("checkpoint"):
                    checkpoints.save(train_state, recipe)
            dog.ended(now)
            clock.ended(now)
            if told:
                raise stop.Stopped(
                    f"{stage.name:<13} ends at step {now:,} of {stage.steps:,} by "
                    f"{signal.Signals(told).name}; its checkpoint is {folder / str(now)}",
                    told,
                )
    if writes:
        print(
            f"{stage.name:<13} {goodput.words(goodput.summary(goodput.read(folder)))}", flush=True
        )
    return train_state.params


def close(checkpoints: checkpoint.Checkpoints, clock: goodput.Clock, *error) -> None:
    """Waits for the checkpoints that are still being written."""
    with clock.spends("checkpoint"):
        checkpoints.__exit__(*error)


def told_to_stop(signals: stop.Signals, vote: stop.Vote) -> int:
    """The signal after which this step is to be the last one, or 0. On all processes the same."""
    told = signals.first or 0
    return vote(told) if jax.process_count() > 1 else told


def identity(stage: config.Stage, workdir: epath.Path) -> dict[str, object]:
    """What must be the same on all processes of a run, by name."""
    tokenizer = Tokenizer(workdir / stage.data.tokenizer)
    folder = corpus.open(storage.beside(workdir, stage.data.corpus), tokenizer)
    recipe = lineage.describe(stage, tokenizer.fingerprint, folder.fingerprint)
    own = ("stage.data.corpus", "stage.data.tokenizer")  # each may have a copy of its own
    said = lineage.flat(recipe) | agreement.machine()
    return {name: value for name, value in said.items() if name not in own}


def first_state(
    stage: config.Stage,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    checkpoints: checkpoint.Checkpoints,
    recipe: dict,
) -> state.TrainState:
    """The state to go on from. Looked for in this order; the order matters:

    1. the newest checkpoint of this stage: the run goes on, bit for bit, where it was;
    2. the newest checkpoint of stage.start_from: its weights, a fresh optimizer;
    3. random weights, if stage.start_from is None.
    """
    tx = optim.adamw(stage.optim, stage.steps)
    fingerprint = recipe["tokenizer_fingerprint"]
    if checkpoints.latest() is not None:
        saved = checkpoint.read_recipe(checkpoints.folder)
        lineage.check_same_stage(
            saved, stage, fingerprint, checkpoints.folder, recipe["corpus_fingerprint"]
        )
        return checkpoints.restore(state.abstract_state(stage.model, tx, mesh))
    if stage.start_from is not None:
        parent = workdir / stage.start_from
        check(
            checkpoint.any_step(parent),
            f"stage {stage.name!r} starts from {stage.start_from!r}, but {parent} holds no "
            f"checkpoint: train that stage first, or import weights there",
        )
        saved, found = checkpoint.read_recipe(parent), checkpoint.find(parent)
        lineage.check_parent(saved, stage, fingerprint, parent)
        steps = (saved["stage"] or {}).get("steps", int(found.name))
        check(
            found == parent or int(found.name) == steps,
            f"{parent} is at step {found.name} of {steps}: train it to its end, or start from that "
            f"step with start_from={stage.start_from}/{found.name}",
        )
        params = checkpoint.restore_params(parent, stage.model, mesh)
        return state.state_from_params(params, stage.model, tx, mesh)
    return state.random_state(stage.model, tx, mesh, stage.seed)


def evaluate(
    judge: heldout.Judge, params: state.Params, record: Record, clock: goodput.Clock
) -> None:
    before = clock.spent["evaluation"]
    with clock.spends("evaluation"):
        losses = judge(params)
    record.evaluated(losses, clock.spent["evaluation"] - before)


def opening(stage: config.Stage, mesh: jax.sharding.Mesh, start: int) -> str:
    """What is about to run, in one line."""
    devices = mesh.devices.size
    gigabytes = 12 * stage.model.num_params / devices / 1e9  # weights and two moments, float32
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1"
    origin = f"resumes at step {start}" if start else f"starts from {stage.start_from or 'nothing'}"
    return (
        f"{stage.name:<13} {origin}: {stage.model.num_params / 1e6:,.1f} M parameters, "
        f"{stage.steps:,} steps of {stage.data.batch_tokens:,} tokens in rows of "
        f"{stage.data.seq_len:,}, mesh {axes} of {devices} {mesh.devices.flat[0].device_kind}, "
        f"{gigabytes:.2g} GB of state each"
    )


def profile(
    stage: config.Stage, folder: epath.Path, start: int, now: int, train_state: state.TrainState
) -> None:
    """Records steps profile_from .. profile_from + 2 for TensorBoard's profiler.

    A run that starts inside or behind this window does not profile.
    """
    if stage.profile_from <= start:
        return
    if now == stage.profile_from:
        jax.profiler.start_trace(str(folder / "events"))
    if now == stage.profile_from + 3:
        jax.block_until_ready(train_state)
        jax.profiler.stop_trace()


# -- refusals ------------------------------------------------------------------------------------
def check_fits(stage: config.Stage, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError where stage, tokenizer and mesh contradict each other."""
    check(
        tokenizer.vocab_size == stage.model.vocab_size,
        f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, the model of stage "
        f"{stage.name!r} has vocab_size={stage.model.vocab_size}",
    )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = stage.data.rows_per_batch // stage.layout.microbatches
    check(
        rows % ways == 0,
        f"{rows} rows per microbatch do not divide among data * fsdp = {ways} devices: change "
        "data.batch_tokens, layout.microbatches or the mesh",
    )
    check(
        stage.profile_from == -1 or 1 <= stage.profile_from <= stage.steps - 3,
        f"profile_from={stage.profile_from} is not a step with 3 after it; of steps={stage.steps} "
        f"1 to {stage.steps - 3} are (-1: no profile)",
    )


def prepare_folder(folder: epath.Path) -> None:
    """Makes the stage's folder; refuses one that cannot be written before any work is done."""
    if jax.process_index() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "probe.tmp"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


def keep_tokenizer(tokenizer: Tokenizer, folder: epath.Path) -> None:
    """Puts the tokenizer beside the weights; only once it is known to be theirs."""
    if jax.process_index() != 0:
        return
    for name, content in tokenizer.files().items():
        whole.write(folder / name, content)
