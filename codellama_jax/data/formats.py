"""Files of records in many formats: cut into parts, each of which is read alone, as a stream.

    .jsonl, .json, .ndjson               byte ranges; .gz and .zst are one part each
    .parquet                             row groups
    .array_record, JSON records          record ranges
    a TensorFlow Datasets name or folder record ranges (extra `tfds`; TensorFlow is not needed)

A record is a dict, or the line itself where it is none.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from codellama_jax.data import corpus, storage

JSON_LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst")
ARRAY_RECORD = (".array_record", ".arrayrecord")
ENDINGS = (*JSON_LINES, *PACKED, ".parquet", *ARRAY_RECORD)


@dataclass(frozen=True)
class Part:
    """Some of the records of a file, or of a split of a data set."""

    kind: str  # json, packed, parquet, array_record, tfds
    path: str
    num_bytes: int  # about
    start: int = 0  # byte, row group or record
    end: int = 0
    split: str = ""  # of a TensorFlow data set


def is_data(path: Path) -> bool:
    """Whether a directory that holds this file is one of data, not of source code."""
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    endings = (".jsonl", ".ndjson", ".parquet", ".array_record")
    return plain.endswith(endings) and path.is_file()


def is_data_set(folder: Path) -> bool:
    """Whether this is the folder of a TensorFlow data set."""
    return (folder / "dataset_info.json").exists()


def parts(given: str | Path, *, part_bytes: int) -> Iterator[Part]:
    """The parts of a file, or of a TensorFlow data set by its name or folder, in order.

    Raises ValueError for what is missing or of an unknown format.
    """
    path = storage.path(given)
    if not path.is_file():
        yield from _tfds_parts(str(given), part_bytes)
        return
    size = storage.size(path)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        yield Part("packed", str(path), size)
    elif suffix in JSON_LINES:
        for start in range(0, size, part_bytes):
            end = min(start + part_bytes, size)
            yield Part("json", str(path), end - start, start, end)
    elif suffix == ".parquet":
        yield from _parquet_parts(path, part_bytes)
    elif suffix in ARRAY_RECORD:
        count = len(_array_record(str(path)))
        yield from _ranges("array_record", str(path), count, size, part_bytes)
    else:
        raise ValueError(
            f"{path} has an unknown format; known are directories of source files and "
            f"{', '.join(ENDINGS)}"
        )


def read(part: Part) -> Iterator[dict | bytes]:
    """The records of a part, in order. Raises ValueError where its file is damaged."""
    try:
        yield from _READERS[part.kind](part)
    except (OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{part.path} cannot be read: {error}") from None


# -- parts ------------------------------------------------------------------------------------


def _ranges(kind: str, path: str, count: int, size: int, part_bytes: int, split: str = ""):
    """Parts of equal numbers of records, about part_bytes each."""
    num_parts = max(-(-size // part_bytes), 1)
    step = max(-(-count // num_parts), 1)
    for start in range(0, count, step):
        end = min(start + step, count)
        yield Part(kind, path, size * (end - start) // count, start, end, split)


def _parquet_parts(path: Path, part_bytes: int) -> Iterator[Part]:
    with path.open("rb") as file:
        metadata = _pyarrow().ParquetFile(file).metadata
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group == metadata.num_row_groups - 1:
            yield Part("parquet", str(path), size, start, group + 1)
            start, size = group + 1, 0


def _tfds_parts(name: str, part_bytes: int) -> Iterator[Part]:
    splits = _tfds_builder(name).info.splits
    for split, info in sorted(splits.items()):
        yield from _ranges("tfds", name, info.num_examples, info.num_bytes, part_bytes, split)


# -- records ----------------------------------------------------------------------------------


def _read_json(part: Part) -> Iterator[dict | bytes]:
    """The lines that begin in [start, end)."""
    with storage.path(part.path).open("rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while file.tell() < part.end and (line := file.readline()):
            if line.strip():
                yield _parse(line)


def _read_packed(part: Part) -> Iterator[dict | bytes]:
    packed = storage.path(part.path).open("rb")
    if part.path.endswith(".gz"):
        file = gzip.GzipFile(fileobj=packed)
    else:
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{part.path} needs the package zstandard; install it") from None
        unpacked = zstandard.ZstdDecompressor().stream_reader(packed)
        file = io.BufferedReader(unpacked, 1 << 20)
    with packed, file:
        try:
            for line in file:
                if line.strip():
                    yield _parse(line)
        except Exception as error:  # gzip, zlib and zstandard have errors of their own
            raise ValueError(f"{part.path} is damaged: {error}") from None


def _read_parquet(part: Part) -> Iterator[dict]:
    with storage.path(part.path).open("rb") as opened:
        file = _pyarrow().ParquetFile(opened)
        for batch in file.iter_batches(256, row_groups=range(part.start, part.end)):
            yield from batch.to_pylist()


def _read_array_record(part: Part) -> Iterator[dict | bytes]:
    records = _array_record(part.path)
    for number in range(part.start, part.end):
        yield _parse(records[number])


def _read_tfds(part: Part) -> Iterator[dict]:
    records = _tfds_builder(part.path).as_data_source(split=part.split)
    for number in range(part.start, part.end):
        yield records[number]


_READERS = {
    "json": _read_json,
    "packed": _read_packed,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
    "tfds": _read_tfds,
}


def _parse(line: bytes) -> dict | bytes:
    """The record, or the line itself where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return record if isinstance(record, dict) else line


# -- the libraries that read them -------------------------------------------------------------


def _array_record(path: str):
    return corpus.record_source([storage.path(path)])


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet files need the package pyarrow; install it") from None
    return pyarrow.parquet


def _tfds_builder(name: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            f"{name} is neither a file nor a directory; for the name of a TensorFlow data set "
            "install the package tensorflow-datasets (TensorFlow is not needed)"
        ) from None
    try:
        if storage.path(name).is_dir():
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name, file_format="array_record")
        if not builder.is_prepared():
            builder.download_and_prepare()
        return builder
    except (ValueError, OSError, tfds.core.registered.DatasetNotFoundError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} is neither a file nor a directory, nor a TensorFlow data set ({first})"
        ) from None
