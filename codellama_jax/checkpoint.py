"""Checkpoints: whole or absent, written while training goes on, restored onto any mesh.

<workdir>/<stage>/<step>/params      weights, float32, Meta's names, layers stacked
                        /opt_state   Adam's moments (absent in imported weights)
                        /recipe      JSON: model, stage, fingerprints, versions, checksums
<workdir>/<stage>/tokenizer.model    the tokenizer the weights speak
"""

import contextlib
import logging
import math
import os
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from etils import epath

from codellama_jax import bits, config, state, stop, tokenizer
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
        recipe = recipe | {"checksums": bits.checksums(arrays)}
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

    dtype: float32 if None. Raises ValueError for other bits than were written. Where `dtype`
    rounds, one weight after the other is read as it is stored, checked, and then rounded.
    """
    step, dtype = find(path), np.dtype(dtype or np.float32)
    stored = _stored_dtype(step)
    if dtype in (np.float32, stored):
        return _read(step, _placed(model, mesh, dtype))
    return _rounded(step, _placed(model, mesh, stored), dtype)


def _stored_dtype(step: epath.Path) -> np.dtype:
    with _readable(step):
        return np.dtype(ocp.PyTreeCheckpointHandler().metadata(step / "params").tree["norm"].dtype)


def _placed(model: config.Model, mesh: jax.sharding.Mesh | None, dtype: np.dtype) -> Any:
    """Shapes, dtype and places of the weights: over `mesh`, or on the first device."""
    abstract = state.abstract_params(model)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: place, abstract)
    else:
        places = state.param_shardings(model, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), abstract, places
    )


def _read(step: epath.Path, wanted: Any, part: bool = False) -> Any:
    """The weights that `wanted` describes (all, or a part of them), checked."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with _readable(step), reader:
        params = reader.restore(step / "params", args=_restore(wanted, partial_restore=part))
    check_params(params, step)
    return params


def _rounded(step: epath.Path, wanted: Any, dtype: np.dtype) -> Any:
    """Weights in `dtype`, so that never more than one of them is there as it is stored, too."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(wanted)
    made = []
    for path, leaf in leaves:
        for key in reversed(path):
            leaf = {key.key: leaf}
        made += [x.astype(dtype) for x in jax.tree.leaves(_read(step, leaf, part=True))]
    return jax.tree.unflatten(structure, made)


def check_params(params: Any, step: epath.Path) -> None:
    """Raises ValueError unless these weights, of `step`, are those that were written."""
    if next(iter(jax.tree.leaves(params))).dtype == np.float32:
        check_bits({"params": params}, step)
    if has_checksums(step):  # of imported weights
        from codellama_jax.convert import proof

        known = proof.read(step.parent)
        check(
            known.model == read_recipe(step)["model"],
            f"{step} is damaged: its recipe names another model than {proof.NAME} beside it; "
            "import the weights again",
        )
        proof.check_params(params, known, step)


def check_bits(tree: Any, step: epath.Path) -> None:
    """Raises ValueError unless the arrays are those that were written; old ones cannot tell."""
    written = read_recipe(step).get("checksums") if (step / "recipe").exists() else None
    if not written:
        return
    now = bits.checksums(tree)
    wrong = [name for name in now if now[name] != written.get(name)]
    check(
        not wrong,
        f"the checkpoint {step} is damaged: {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)} "
        "hold other bits than were written; restore it from a copy, or remove that folder to use "
        "the step before it",
    )


def load(
    path: epath.PathLike, mesh: jax.sharding.Mesh | None = None, dtype=None
) -> tuple[config.Model, state.Params, epath.Path | None]:
    """(model, weights, tokenizer file or None) of a checkpoint or of a stage's folder.

    dtype=None reads imported weights as they are stored: bfloat16 never becomes float32.
    """
    step = find(path)
    model = read_recipe(step)["model"]
    params = restore_params(step, model, mesh, dtype or _stored_dtype(step))
    return model, params, tokenizer.beside(step.parent)
