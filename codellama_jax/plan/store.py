"""What the compiler said, kept in a folder by a hash of what it was asked."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codellama_jax import whole


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "codellama_jax" / "plan"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def own_code(sources: Sequence[str]) -> str:
    """A hash of source files, by their paths in the package without the ending."""
    package = Path(__file__).parents[1]
    files = [package / f"{name}.py" for name in sources]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def versions() -> dict[str, str]:
    """Of what compiles. Read without loading any of it."""
    from importlib import metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def save(path: Path, value: Any) -> None:
    """Bytes as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write(path, value if isinstance(value, bytes) else json.dumps(value))
