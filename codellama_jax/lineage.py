"""What made some weights, and which stage may go on from them: the recipe beside a checkpoint."""

import dataclasses
import importlib.metadata
from typing import Any

from codellama_jax import config
from codellama_jax.config import check


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


# -- may this stage go on from what lies there? ---------------------------------------------------
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
