"""The file of a SentencePiece model: read, taken apart, put together again.

It is a protocol buffer. Reading it here, not with a generated module, keeps out a clash: two
libraries that bring the same .proto file cannot be imported together.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import sentencepiece
from etils import epath

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces

# Numbers of fields:
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # of a model
TEXT, SCORE, TYPE = 1, 2, 3  # of a piece
_VOCAB_SIZE, _ADD_DUMMY_PREFIX = 4, 3  # of the trainer's and the normalizer's settings


class Settings(NamedTuple):
    """What a model says about encoding and decoding, besides its pieces."""

    model_type: int  # 2: byte-pair encoding
    space_after: bool  # words end in a space instead of beginning with one
    byte_fallback: bool  # a character that is no piece becomes its bytes
    unknown: bytes  # what <unk> decodes to
    character_map: bytes  # characters that are replaced; empty: none
    puts_space: bool  # a space is put before a text
    trims: bool  # superfluous spaces are removed
    escapes_space: bool  # pieces write a space as U+2581


def read(path: str) -> bytes:
    """The bytes of a whole SentencePiece model. Raises ValueError for anything else."""
    try:
        model = epath.Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"there is no file {path}; give the path of a tokenizer.model") from error
    try:
        if {_PIECE, _TRAINER, _NORMALIZER} <= {number for number, _ in fields(model)}:
            load(model)
            return model
    except (RuntimeError, ValueError, LookupError):
        pass
    raise ValueError(
        f"{path} ({len(model)} bytes) is not a whole SentencePiece model; "
        "is it a tokenizer.json, a Git LFS pointer, or a broken download?"
    )


def load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def settings(model: bytes) -> Settings:
    """The settings of a model, with SentencePiece's defaults where the file is silent."""
    trainer, normalizer = {}, {}
    for number, value in fields(model):
        if number in (_TRAINER, _NORMALIZER):
            (trainer if number == _TRAINER else normalizer).update(fields(value))
    return Settings(
        model_type=trainer.get(3, 1),
        space_after=bool(trainer.get(24, 0)),
        byte_fallback=bool(trainer.get(35, 0)),
        unknown=trainer.get(44, " \u2047 ".encode()),
        character_map=normalizer.get(2, b""),
        puts_space=bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)),
        trims=bool(normalizer.get(4, 1)),
        escapes_space=bool(normalizer.get(5, 1)),
    )


def with_settings(model: bytes, *, vocab_size: int, puts_space: bool) -> bytes:
    """The model with two settings changed: of a field that occurs twice, readers take the last."""
    trainer = pack([(_VOCAB_SIZE, vocab_size)])
    normalizer = pack([(_ADD_DUMMY_PREFIX, int(puts_space))])
    return model + pack([(_TRAINER, trainer), (_NORMALIZER, normalizer)])


# -- pieces --------------------------------------------------------------------------------------


def split(model: bytes) -> tuple[list[bytes], bytes]:
    """The pieces of a model, each a message, and the rest of it."""
    everything = list(fields(model))
    rest = pack(field for field in everything if field[0] != _PIECE)
    return [value for number, value in everything if number == _PIECE], rest


def join(pieces: Iterable[bytes], rest: bytes) -> bytes:
    """The inverse of `split`."""
    return pack((_PIECE, piece) for piece in pieces) + rest


def piece(text: str, score: float, kind: int) -> bytes:
    """A piece as a message."""
    return pack([(TEXT, text.encode()), (SCORE, score), (TYPE, kind)])


def as_kind(message: bytes, kind: int) -> bytes:
    """The same piece, of another kind."""
    return message + pack([(TYPE, kind)])


# -- protocol buffers ----------------------------------------------------------------------------


def pack(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    """Serializes (number, value) pairs."""
    message = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            message += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            message += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            message += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(message)


def _varint(number: int) -> bytes:
    """`number` in groups of seven bits, lowest first; the top bit of a byte says more follow."""
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the (number, value) pairs of a message: integers, or the bytes of all else.

    Raises a LookupError when the bytes are no message.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = message[at]
            number |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return number

    while at < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[at : at + size]
        at += size
