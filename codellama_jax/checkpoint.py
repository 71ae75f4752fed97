"""Checkpoints: whole or absent, written while training goes on, restored onto any mesh.

<workdir>/<stage>/<step>/params      weights, float32, Meta's names, layers stacked
                        /opt_state   Adam's moments (absent in imported weights)
                        /recipe      JSON: model, stage, fingerprints, versions, checksums
<workdir>/<stage>/tokenizer.model    the tokenizer the weights speak
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from etils import epath

from codellama_jax import config, state, stop, tokenizer
from codellama_jax.config import check

ITEMS = ("params", "opt_state", "recipe")
TOGETHER = (None, stop.Stopped, FloatingPointError)  # what all processes end with at once


class Checkpoints:
    """The checkpoints of one stage, open for writing. Close it (or use `with`) to finish writes."""

    def __init__(self, folder: epath.PathLike, keep: int):
        # Orbax narrates every file at INFO, and prints the errors that it raises as well
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = absolute(folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.LatestN(keep),
                cleanup_tmp_directories=True,  # what a killed run left half-written
            ),
            item_names=ITEMS,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind not in TOGETHER and jax.process_count() > 1:
            return  # closing waits for all processes, which do not know of this one's error
        with _writable(self.folder):
            self._manager.close()

    def latest(self) -> int | None:
        """Newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, train_state: state.TrainState, recipe: dict) -> None:
        """Starts writing the state under its step; returns once the arrays are copied.

        Raises OSError when the one before could not be written (so does closing).
        """
        step = int(train_state.step)
        if step in self._manager.all_steps():
            return
        arrays = {"params": train_state.params, "opt_state": train_state.opt_state}
        recipe = recipe | {"checksums": checksums(arrays)}
        with _writable(self.folder):  # or the one before, which was still being written
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(
                        train_state.params, save_args=_by_layer(train_state.params)
                    ),
                    opt_state=ocp.args.PyTreeSave(train_state.opt_state),
                    recipe=ocp.args.JsonSave(recipe),
                ),
            )

    def restore(self, abstract: state.TrainState) -> state.TrainState:
        """The newest state, placed as `abstract` says (shapes, dtypes, shardings)."""
        step = self.latest()
        with _readable(self.folder / str(step)):
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=_restore(abstract.params), opt_state=_restore(abstract.opt_state)
                ),
            )
        check_bits({"params": saved.params, "opt_state": saved.opt_state}, self.folder / str(step))
        counter = jax.device_put(np.int32(step), abstract.step.sharding)
        return state.TrainState(counter, saved.params, saved.opt_state)

    def must_save(self, step: int) -> bool:
        """True once the machine has been told that it will be taken away (on all processes)."""
        return self._manager.reached_preemption(step)


SMALLEST_CHUNK = 1 << 14  # bytes


def _by_layer(params: state.Params) -> Any:
    """How to store weights: in chunks of one layer, so that a converter need not read them all.

    Where a device holds so little of a weight that its chunks would be tiny, they hold all layers.
    """

    def chunks(weight: jax.Array) -> ocp.SaveArgs:
        shard = weight.sharding.shard_shape(weight.shape)
        layer = math.prod(shard[1:]) * weight.dtype.itemsize
        return ocp.SaveArgs(shard_axes=(0,) if layer >= SMALLEST_CHUNK else ())

    layers = jax.tree.map(chunks, params["layers"])
    return jax.tree.map(lambda _: ocp.SaveArgs(), params) | {"layers": layers}


def _restore(abstract: Any, **options: bool) -> ocp.args.PyTreeRestore:
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(item=abstract, restore_args=args, **options)


@contextlib.contextmanager
def _writable(folder: epath.Path):
    """Says in one sentence that a checkpoint was not written; what Orbax raises has many types."""
    try:
        yield
    except Exception as error:
        said = str(error).partition("\n")[0]
        reason = re.sub(r" \[\w+='.*", "", said)[-160:]  # TensorStore adds all its settings
        raise OSError(
            f"a checkpoint could not be written to {folder}; those before it are whole. Is there "
            f"space left? Start again to go on from the newest. Reason: ...{reason}"
        ) from error


@contextlib.contextmanager
def _readable(step: epath.Path):
    """Says in one sentence that a checkpoint is damaged; Orbax has no error of its own for it."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0][:160]
        raise ValueError(
            f"the checkpoint {step} cannot be read; restore it from a copy, or remove that folder "
            f"to use the step before it. Reason: {reason}"
        ) from error


def find(path: epath.PathLike) -> epath.Path:
    """The step folder meant by `path`: itself, or the newest step of a stage's folder.

    Raises ValueError when there is none, with what lies there instead.
    """
    path = absolute(path)
    check(path.is_dir(), f"there is no checkpoint at {path}: there is no such folder")
    if is_whole(path):
        return path
    stages = sorted(p.name for p in path.iterdir() if _steps(p))
    hint = f"; it holds the stages {', '.join(stages)}" if stages else ""
    check(bool(_steps(path)), f"there is no checkpoint in {path}{hint}")
    return _steps(path)[-1]


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, as Orbax wants it; gs:// and its like as they are."""
    text = os.path.expanduser(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def has_checksums(path: epath.PathLike) -> bool:
    """True for imported weights beside which lies the table of their checksums."""
    step = find(path)
    return step.name == "0" and (step.parent / "checksums.json").exists()


def any_step(folder: epath.Path) -> bool:
    """True for a whole checkpoint, and for a stage's folder that holds at least one."""
    return is_whole(folder) or bool(_steps(folder))


def is_whole(step: epath.Path) -> bool:
    """True for the folder of a checkpoint that was written to its end."""
    return (step / "params").exists() and ocp.utils.is_checkpoint_finalized(step)


def _steps(folder: epath.Path) -> list[epath.Path]:
    """The whole checkpoints in a stage's folder, oldest first."""
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if p.name.isdigit() and is_whole(p)]
    return sorted(steps, key=lambda p: int(p.name))


def read_recipe(path: epath.PathLike) -> dict:
    """The recipe JSON of a checkpoint; its "model" becomes a config.Model."""
    step = find(path)
    with _readable(step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        recipe = reader.restore(step / "recipe")
        recipe["model"] = config.from_json(config.Model, recipe["model"])
    return recipe


def restore_params(
    path: epath.PathLike, model: config.Model, mesh: jax.sharding.Mesh | None = None, dtype=None
) -> state.Params:
    """The weights of a checkpoint of `model`, cast to `dtype` while read, placed on `mesh`.

    Raises ValueError for other bits than were written. Where `dtype` rounds, one weight after the
    other is read as it is stored, checked, and rounded on the devices.
    """
    abstract = state.abstract_params(model)
    if mesh is None:
        places = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract
        )
    else:
        places = state.param_shardings(model, mesh)
    step, dtype = find(path), np.dtype(dtype or np.float32)
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        with _readable(step):
            stored = np.dtype(handler.metadata(step / "params").tree["norm"].dtype)
        rounds = dtype not in (np.float32, stored)

        def read(abstract: Any, places: Any) -> Any:
            kind = stored if rounds else dtype
            wanted = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, kind, sharding=place),
                abstract,
                places,
            )
            with _readable(step):
                args = _restore(wanted, partial_restore=rounds)
                params = reader.restore(step / "params", args=args)
            check_params(params, step)
            return jax.tree.map(lambda x: x.astype(dtype), params) if rounds else params

        if not rounds:
            return read(abstract, places)
        return _one_by_one(read, abstract, places)


def _one_by_one(read: Callable, abstract: Any, places: Any) -> Any:
    """What `read` makes of the whole tree, called with one leaf at a time."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    made = []
    for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
        for key in reversed(path):
            leaf, place = {key.key: leaf}, {key.key: place}
        made += jax.tree.leaves(read(leaf, place))
    return jax.tree.unflatten(structure, made)


def check_params(params: Any, step: epath.Path) -> None:
    """Raises ValueError unless these weights, of `step`, are those that were written."""
    if next(iter(jax.tree.leaves(params))).dtype == np.float32:
        check_bits({"params": params}, step)
    if has_checksums(step):  # of imported weights
        from codellama_jax.convert import proof

        proof.check_params(params, proof.read(step.parent), step)


def load(
    path: epath.PathLike, mesh: jax.sharding.Mesh | None = None, dtype=None
) -> tuple[config.Model, state.Params, epath.Path | None]:
    """(model, weights, tokenizer file or None) of a checkpoint or of a stage's folder.

    dtype=None reads imported weights as they are stored: bfloat16 never becomes float32.
    """
    step = find(path)
    model = read_recipe(step)["model"]
    with _readable(step):
        stored = ocp.PyTreeCheckpointHandler().metadata(step / "params").tree["norm"].dtype
    params = restore_params(step, model, mesh, dtype or stored)
    return model, params, tokenizer.beside(step.parent)


def describe(stage: config.Stage, fingerprint: str, corpus_fingerprint: str | None = None) -> dict:
    """The recipe JSON written beside the weights of `stage`; `fingerprint` is the tokenizer's."""
    return {
        "model": config.to_json(stage.model),
        "stage": config.to_json(stage),
        "tokenizer_fingerprint": fingerprint,
        "corpus_fingerprint": corpus_fingerprint,
        "code_version": _version("codellama_jax"),
        "versions": {name: _version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# -- are the bits those that were written? -------------------------------------------------------
def checksums(tree: Any) -> dict[str, int]:
    """A checksum of the bits of each array of `tree`, by its path; the same on every mesh.

    Disks and networks change bits, and what stores the chunks does not notice.
    """
    sums = jax.device_get(_sums(tree))
    leaves = jax.tree_util.tree_leaves_with_path(sums)
    return {jax.tree_util.keystr(path, simple=True, separator="."): int(s) for path, s in leaves}


@jax.jit
def _sums(tree: Any) -> Any:
    """Bits as integers, times odd numbers that differ by place, summed modulo 2^32."""

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
        place = np.uint32(0)
        for axis, size in enumerate(x.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(np.uint32, x.shape, axis)
        return (bits * (2 * place + 1)).sum(dtype=np.uint32)

    return jax.tree.map(checksum, tree)


def check_bits(tree: Any, step: epath.Path) -> None:
    """Raises ValueError unless the arrays are those that were written; old ones cannot tell."""
    written = read_recipe(step).get("checksums") if (step / "recipe").exists() else None
    if not written:
        return
    now = checksums(tree)
    wrong = [name for name in now if now[name] != written.get(name)]
    check(
        not wrong,
        f"the checkpoint {step} is damaged: {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)} "
        "hold other bits than were written; restore it from a copy, or remove that folder to use "
        "the step before it",
    )


# -- may this stage go on from what lies there? --------------------------------------------------
FREE = {  # fields that change speed or cadence but no number that is trained
    "layout", "log_every", "eval_every", "eval_rows", "save_every", "keep_checkpoints",
    "profile_from", "stuck_after", "data.workers", "data.corpus", "data.tokenizer", "data.rows",
}  # fmt: skip


def check_same_stage(
    saved: dict,
    stage: config.Stage,
    fingerprint: str,
    folder: Any,
    corpus_fingerprint: str | None = None,
) -> None:
    """Raises ValueError when `folder` was made by another recipe, naming each difference."""
    old, new = flat(saved["stage"] or {}), flat(config.to_json(stage))
    differences = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and name not in FREE
        and name.partition(".")[0] not in FREE
    ]
    check(
        not differences,
        f"{folder} was made by another recipe: {'; '.join(differences)}. "
        "Set it back, or use another --workdir",
    )
    known = saved.get("corpus_fingerprint")
    check(
        None in (known, corpus_fingerprint) or known == corpus_fingerprint,
        f"{folder} was trained on another corpus (fingerprint {str(known)[:12]}, the one now at "
        f"{stage.data.corpus!r} is {str(corpus_fingerprint)[:12]}); put that one back, or use "
        "another --workdir",
    )
    check_tokenizer(saved, fingerprint, folder)


def check_parent(saved: dict, stage: config.Stage, fingerprint: str, folder: Any) -> None:
    """Raises ValueError when the weights in `folder` cannot start `stage`.

    The RoPE base and the longest row may change between stages; the shape may not.
    """
    old = dataclasses.replace(
        saved["model"], rope_theta=stage.model.rope_theta, max_seq_len=stage.model.max_seq_len
    )
    old, new = config.to_json(old), config.to_json(stage.model)
    differences = [f"{k} is {old[k]!r} there, {new[k]!r} here" for k in old if old[k] != new[k]]
    check(
        not differences,
        f"stage {stage.name!r} cannot start from {folder}: {'; '.join(differences)}",
    )
    check_tokenizer(saved, fingerprint, folder)


def check_tokenizer(saved: dict, fingerprint: str, folder: Any) -> None:
    known = saved.get("tokenizer_fingerprint")
    check(
        known in (None, fingerprint),
        f"{folder} was trained with another tokenizer (fingerprint {str(known)[:12]}, this one is "
        f"{fingerprint[:12]}); use the tokenizer.model beside those weights",
    )


def flat(values: dict, prefix: str = "") -> dict:
    """Nested fields by their dotted paths; a mix stays whole."""
    fields = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "mix":
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
