"""Vocabularies: what is in a SentencePiece file, and Code Llama's infilling pieces added to one.

Llama 2 has 32,000 pieces; Code Llama has 16 more at the end, of which four are the infilling marks
and the others building blocks and repetitions that mean nothing.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

from codellama_jax.tokenizer import (
    BUILDING_PIECES,
    INFILLING_PIECES,
    SPACE,
    STEP_PIECE,
    json_file,
    spm_file,
)
from codellama_jax.tokenizer.spm_file import NORMAL, UNUSED, USER_DEFINED

CODE_LLAMA_PIECES = (  # ids 32000..32015 of Code Llama 7B and 13B
    *BUILDING_PIECES,
    *INFILLING_PIECES,
    *(SPACE + "<EOT>" * n for n in range(2, 7)),
)


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def pieces(path: Path) -> list[Piece]:
    """The pieces of SentencePiece file `path`, by id."""
    found = []
    for message in spm_file.split(spm_file.read(str(path)))[0]:
        values = dict(spm_file.fields(message))  # 1: text, 2: score, 3: kind
        score = struct.unpack("<f", values.get(2, bytes(4)))[0]
        found.append(Piece(values[1].decode(), score, values.get(3, NORMAL)))
    return found


def size(paths: tuple[Path, ...]) -> int | None:
    """The number of ids of a tokenizer's files; None if they are none that we can count."""
    for path in paths:
        if path.suffix == ".model":
            return len(pieces(path))
        if path.name == "tokenizer.json":
            return 1 + max(json_file.ids(str(path)).values())
    return None


def ends(paths: tuple[Path, ...]) -> tuple[int, list[int]]:
    """(BOS, ids at which generation ends) of a tokenizer's files; Llama's if there are none.

    Besides EOS that is the mark that ends an infilling, and the one that ends a 70B message.
    """
    for path in paths:
        if path.suffix == ".model":
            processor = spm_file.load(spm_file.read(str(path)))
            names = {piece.text: i for i, piece in enumerate(pieces(path))}
            bos, eos = processor.bos_id(), processor.eos_id()
        elif path.name == "tokenizer.json":
            names = json_file.ids(str(path))
            bos, eos = json_file.ends(str(path))
        else:
            continue
        marks = [names[name] for name in (INFILLING_PIECES[3], STEP_PIECE) if name in names]
        return 1 if bos is None else bos, [2 if eos is None else eos, *marks]
    return 1, [2]


def grow(files: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    """Writes the tokenizer of these files with infilling marks into `folder`; what was written.

    Llama 2's 32,000 pieces get all 16 of Code Llama after them, others the four marks. No text ever
    becomes one of the new pieces except the marks, and those only if a tokenizer is told to trust
    the text. Raises ValueError if the marks are there already, or there is no tokenizer.
    """
    names = {"tokenizer.model" if path.suffix == ".model" else path.name: path for path in files}
    if "tokenizer.model" in names:
        _grow_pieces(names["tokenizer.model"], folder / "tokenizer.model")
        return (folder / "tokenizer.model",)
    if "tokenizer.json" not in names:
        raise ValueError("there is no tokenizer to add infilling marks to; give --tokenizer")
    source = names.pop("tokenizer.json")
    content = json_file.with_infilling(str(source))
    (folder / source.name).write_text(json.dumps(content, ensure_ascii=False))
    names.pop("generation_config.json", None)  # it does not know the new end
    for name, path in names.items():
        shutil.copyfile(path, folder / name)
    return tuple(folder / name for name in (source.name, *names))


def _grow_pieces(source: Path, destination: Path) -> None:
    old = pieces(source)
    new = CODE_LLAMA_PIECES if len(old) == 32_000 else INFILLING_PIECES
    clash = sorted({piece.text for piece in old} & set(new))
    if clash:
        raise ValueError(f"{source} has {clash[0]} already; there is nothing to grow")
    old_pieces, rest = spm_file.split(spm_file.read(str(source)))
    kinds = [USER_DEFINED if text in INFILLING_PIECES else UNUSED for text in new]
    added = [spm_file.piece(text, 0.0, kind) for text, kind in zip(new, kinds, strict=True)]
    destination.write_bytes(spm_file.join([*old_pieces, *added], rest))
