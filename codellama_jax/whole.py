"""Files that are whole or absent, whenever the process that writes them is killed."""

import os

from etils import epath


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes under a temporary name, each process its own, then renames."""
    path = epath.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
