"""Do all processes of a run do the same? Their fingerprints, compared before the first step.

Recipe, code, libraries, corpus and tokenizer must be equal on all hosts: a pod whose hosts differ
would train on, wrongly.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path

from codellama_jax.config import check

SIZE = 1 << 14  # bytes of what a process says about itself
LIBRARIES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain",
    "array_record", "sentencepiece", "numpy",
)  # fmt: skip


def compare(describe: Callable[[], dict[str, object]]) -> None:
    """Raises ValueError on every process unless describe() returns the same on all of them.

    So does a ValueError or OSError of describe() on any of them. Alone, it is not called.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    try:
        said = {name: str(value) for name, value in describe().items()}
    except (ValueError, OSError) as error:
        said = {"": str(error)[:1_000]}
    text = json.dumps({"host": socket.gethostname(), "said": said}).encode()
    check(len(text) <= SIZE, f"a description of {len(text)} bytes is longer than {SIZE}")
    all_BS = multihost_utils.process_allgather(np.frombuffer(text.ljust(SIZE), np.uint8))
    everyone = [json.loads(row_S.tobytes()) for row_S in np.asarray(all_BS)]
    hosts = [one["host"] for one in everyone]
    differences = differing(hosts, [one["said"] for one in everyone])
    more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    check(
        not differences,
        f"the processes of this run do not agree: {'; '.join(differences[:4])}{more}. "
        "Start all of them with the same code, command and data",
    )


def differing(hosts: list[str], said: list[dict[str, str]]) -> list[str]:
    """What each process says otherwise than the first, in words."""
    found = [
        f"process {number} on {hosts[number]}: {one['']}"
        for number, one in enumerate(said)
        if "" in one
    ]
    if found:
        return found
    names = sorted(set().union(*said))
    return [
        f"{name} is {one.get(name)} on {hosts[number]} (process {number}), "
        f"{said[0].get(name)} on {hosts[0]} (process 0)"
        for name in names
        for number, one in enumerate(said)
        if one.get(name) != said[0].get(name)
    ]


def machine() -> dict[str, str]:
    """Code, libraries and devices of this process: what must be equal beside the recipe."""
    import jax

    kinds = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    return {
        "code": _digest(Path(__file__).parent),
        "python": platform.python_version(),
        "devices": f"{jax.local_device_count()} x {kinds}",
        **{name: os.environ.get(name, "not set") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        **{name: _version(name) for name in LIBRARIES},
    }


def _digest(folder: Path) -> str:
    """12 digits of the SHA-256 of every Python file in a folder."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
