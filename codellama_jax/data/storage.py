"""Files here and in remote stores (gs://, s3://, ...) alike.

A store's own library does the work, behind etils.epath: gcsfs for Google's (extra `gcs`), which
asks again when a store is busy. Records of ArrayRecord files are read from gs:// by that library
itself, in ranges; what other libraries need as a local file is copied once per process. A copy that
fails is tried again.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

TRIES, FIRST_WAIT = 5, 1.0  # of a copy that fails; the wait in seconds doubles
COPIED_AT_ONCE = 1 << 23  # bytes
SENT_AT_ONCE = 8  # files
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)  # errors that stay


def path(given: str | os.PathLike) -> Path | epath.Path:
    return epath.Path(given) if is_remote(given) else Path(given)


def is_remote(given: str | os.PathLike) -> bool:
    return "://" in os.fspath(given)


def beside(folder: str | os.PathLike, given: str) -> Path | epath.Path:
    """`given` relative to a folder, where it is neither absolute nor in a remote store."""
    return path(given) if is_remote(given) else path(folder) / given


def size(of: Path | epath.Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return of.stat().length if is_remote(of) else of.stat().st_size
    except FileNotFoundError:
        return None


def again(call: Callable):
    """call(), tried again where it fails for a reason that may pass."""
    for number in range(TRIES):
        try:
            return call()
        except LASTING:
            raise
        except Exception:  # every store has errors of its own
            if number == TRIES - 1:
                raise
            time.sleep(FIRST_WAIT * 2**number)


def local(of: Path | epath.Path) -> Path:
    """The file, or a copy of it that lasts as long as this process."""
    return _copied(os.fspath(of)) if is_remote(of) else of


def records(of: Path | epath.Path) -> str:
    """What ArrayRecord's reader opens: it reads gs:// by itself, the rest as local files."""
    return os.fspath(of) if os.fspath(of).startswith("gs://") else str(local(of))


@functools.cache
def _copied(url: str) -> Path:
    target = Path(tempfile.mkdtemp(dir=_folder())) / url.rsplit("/", 1)[1]

    def copy() -> None:
        with epath.Path(url).open("rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, COPIED_AT_ONCE)

    again(copy)
    return target


@functools.cache
def _folder() -> str:
    """Of the copies of this process."""
    folder = tempfile.mkdtemp(prefix="codellama-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def writing(target: Path | epath.Path) -> Iterator[Path]:
    """A local file to write; at the end it is at `target`, whole, or nothing is."""
    if not is_remote(target):
        temporary = target.with_name(target.name + ".tmp")
        yield temporary
        os.replace(temporary, target)
        return
    with tempfile.TemporaryDirectory(prefix="codellama-") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        send(temporary, target)


def send(source: Path, target: epath.Path) -> None:
    """Copies a local file into a store, where it appears when it is whole."""

    def copy() -> None:
        with source.open("rb") as file, target.open("wb") as remote:
            shutil.copyfileobj(file, remote, COPIED_AT_ONCE)

    again(copy)


def send_all(source: Path, target: epath.Path) -> None:
    """Copies the files of a local folder, several at once."""
    with concurrent.futures.ThreadPoolExecutor(SENT_AT_ONCE) as threads:
        list(threads.map(lambda file: send(file, target / file.name), sorted(source.iterdir())))


def move(source: Path | epath.Path, target: Path | epath.Path) -> None:
    """Within one store; a source that is gone was moved by a run before this one."""
    if not is_remote(target):
        if source.exists():
            os.replace(source, target)
    elif again(source.exists):
        again(lambda: source.copy(target, overwrite=True))


def remove(folder: Path | epath.Path) -> None:
    """A folder with all that is in it."""
    if is_remote(folder):
        again(lambda: folder.rmtree(missing_ok=True))
    else:
        shutil.rmtree(folder, ignore_errors=True)
