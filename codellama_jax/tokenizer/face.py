"""Text to token ids and back, as Code Llama does it.

A vocabulary is a SentencePiece `tokenizer.model` (Meta's of 32,000 pieces, Code Llama's of 32,016,
or a nano one of training.py) or a tokenizer.json, which json_file.py reads. What makes
a Tokenizer more than a SentencePieceProcessor:

- *Infilling.* SentencePiece puts a space before every text. A middle or a suffix continues a
  document, so it is encoded without (`encode_infilling`), and decoded without losing a space of
  its own (`decode_infilling`). Paper, section 2.3.
- *Text stays text.* Code Llama's infilling marks are ordinary pieces, so a plain encoder turns
  the text " <EOT>" into the mark that ends an infilling. Ours spells such text with other pieces.
- *Token healing.* A prompt that ends inside a word ends in a token the model never saw there.
  `take_back` gives it up; `allowed_while_spelling` has the model write its text anew.

One loss is SentencePiece's own: the character U+2581, its mark for a space, decodes to a space.
"""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
from etils import epath

from codellama_jax.tokenizer import spm_file

SPACE = "\u2581"  # how pieces write a space
SMILEY = "\u263a"  # put before a text, it takes the space that would be put before the text
INFILLING_PIECES = tuple(SPACE + mark for mark in ("<PRE>", "<SUF>", "<MID>", "<EOT>"))  # by id
STEP_PIECE = "<step>"  # ends a message in the chat of Code Llama 70B
CONTROL_PIECES = (*INFILLING_PIECES, *(SPACE + "<EOT>" * n for n in range(2, 7)), STEP_PIECE)
# Code Llama's other new pieces are there so that merges can reach the four marks; they mean text.
BUILDING_PIECES = tuple(
    SPACE + part for part in ("<SU", "<SUF", "<PRE", "<M", "<MID", "<E", "<EOT")
)
NEVER_FROM_TEXT = frozenset(CONTROL_PIECES + BUILDING_PIECES)

# As in SentencePiece, every byte that is no part of a character becomes one U+FFFD.
codecs.register_error("codellama_each_byte", lambda error: ("\ufffd", error.start + 1))


class Tokenizer:
    """A vocabulary; immutable, and cheap to pickle (only its path travels).

    path           where it was read from
    vocab_size     number of ids
    bos_id eos_id  begin and end of a document
    prefix_id suffix_id middle_id eot_id   marks of an infilling; None where the model has none
    step_id        end of a chat message; None for all but Code Llama 70B
    puts_space         a text that begins a document gets a space in front; Llama's does
    begins_with_bos    a plain text that the model is given begins with BOS; Llama's does
    """

    begins_with_bos = True

    def __new__(cls, path: str | os.PathLike):
        """A tokenizer.json is read by a class of its own, with the same face."""
        if cls is Tokenizer and os.fspath(path).endswith(".json"):
            from codellama_jax.tokenizer import json_file

            return object.__new__(json_file.JsonTokenizer)
        return object.__new__(cls)

    def __init__(self, path: str | os.PathLike):
        """Raises ValueError when there is no file at `path`, or no SentencePiece model in it."""
        self.path = os.fspath(path)
        self._model = spm_file.read(self.path)
        self._trusting = spm_file.load(self._model)
        self.vocab_size = self._trusting.vocab_size()
        self.bos_id, self.eos_id = self._trusting.bos_id(), self._trusting.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{self.path} has no <s> or no </s>; Llama's vocabulary has both")
        self._set_pieces(self._trusting.id_to_piece(list(range(self.vocab_size))))
        ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._guarded = spm_file.load(_guarded(self._model, {ids.get(p) for p in NEVER_FROM_TEXT}))
        self._num_smiley_ids = len(self.encode(SMILEY))
        self._settings = spm_file.settings(self._model)
        self.puts_space = self._settings.puts_space
        self._bytes = [self._bytes_of(i, piece) for i, piece in enumerate(self._pieces)]

    def _set_pieces(self, pieces: list[str]) -> None:
        """Finds the marks among the pieces. Raises ValueError for one that joins SMILEY to more."""
        if any(SMILEY in piece and piece != SMILEY for piece in pieces):
            raise ValueError(
                f"{self.path} has a piece that joins {SMILEY} to other characters, "
                "so it cannot encode text that continues other text"
            )
        ids = {piece: i for i, piece in enumerate(pieces)}
        marks = [ids.get(piece) for piece in (*INFILLING_PIECES, STEP_PIECE)]
        self.prefix_id, self.suffix_id, self.middle_id, self.eot_id, self.step_id = marks
        self._pieces = pieces
        self._names = {ids[name]: name for name in CONTROL_PIECES if name in ids}

    def __reduce__(self):
        return Tokenizer, (self.path,)

    # -- text to ids -----------------------------------------------------------------------------

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, control_text: bool = False
    ) -> list[int]:
        """Ids of a text that begins a document; those of Meta's `encode`.

        control_text=True lets text that spells an infilling mark become that mark, as Meta's
        does; only for text you trust. Raises UnicodeEncodeError (a ValueError) for a lone
        surrogate, which no UTF-8 can hold.
        """
        ids = self._ids_of(text, trusting=control_text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_infilling(self, text: str, control_text: bool = False) -> list[int]:
        """Ids of a text that continues another: no space is put before it (section 2.3).

        encode("Hello") -> [▁Hello]    encode_infilling("Hello") -> [Hello]
        If `a` ends in a newline, encode(a + b) == encode(a) + encode_infilling(b).
        """
        return self.encode(SMILEY + text, control_text=control_text)[self._num_smiley_ids :]

    # -- ids to text -----------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], control_text: bool = False) -> str:
        """Text of ids that begin a document: undoes `encode`.

        Like Meta's, drops the space that `encode` put in front. Control ids decode to nothing, or
        the infilling marks to their names with control_text=True. Raises ValueError for an
        id that is not in the vocabulary.
        """
        return "".join(self.stream(ids, control_text=control_text))

    def decode_infilling(self, ids: Iterable[int], control_text: bool = False) -> str:
        """Text of ids that continue a document: undoes `encode_infilling`.

        decode([▁Remove]) -> "Remove"    decode_infilling([▁Remove]) -> " Remove"
        """
        return "".join(self.stream(ids, infilling=True, control_text=control_text))

    def stream(
        self, ids: Iterable[int], infilling: bool = False, control_text: bool = False
    ) -> Iterator[str]:
        """Yields text as soon as it is whole. Joined it is `decode`, or `decode_infilling`.

        A character that several byte pieces spell waits for its last byte.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="codellama_each_byte")
        drop_space = self.puts_space and not infilling
        for token in ids:
            spelling = self._spelling(int(token), control_text)
            if drop_space and spelling:
                # A space that is a byte piece, or part of " ⁇ ", is not the one put in front.
                added = self._pieces[int(token)].startswith(SPACE)
                spelling, drop_space = spelling[added:], False
            if text := decoder.decode(spelling, final=not spelling):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    # -- token healing ---------------------------------------------------------------------------

    def take_back(self, ids: Sequence[int], most: int = 3) -> tuple[list[int], str]:
        """Takes the last word's tokens from ids, `most` at most: the ids left, the text taken.

        [.., ▁x, ▁=, ▁] -> [.., ▁x, ▁=], " ". Nothing ("") is taken where no following text
        could have merged: from no ids, a control id, or a byte piece such as the newline. Of random
        cuts in code, encoding the whole file keeps the ids left in 90% with one token taken, in
        98.8% with two, and in all of 6,000 with three (Llama's vocabulary).
        """
        ids = [int(token) for token in ids]
        cut = len(ids)
        while cut > 0 and len(ids) - cut < most:
            if not self._spelling(ids[cut - 1]) or self._never_merges(ids[cut - 1]):
                break
            cut -= 1
            if self._bytes[ids[cut]].startswith(b" "):
                break
        return ids[:cut], self.decode_infilling(ids[cut:])

    def allowed_while_spelling(self, text: str) -> np.ndarray:
        """bool[S+1, V]: row s is what may come when s of the S bytes of `text` are written.

        An id is allowed if its text starts with the rest of `text` or is the start of that rest. So
        the model may cut the text its own way: it writes a line indented by four as [▁▁▁] [▁return]
        though the prompt ended in [▁▁▁▁]. After id i, s becomes min(s + num_bytes[i], S). Row S
        allows everything; in the others something is always allowed, if only single bytes.
        """
        wanted = text.encode()
        texts = [b"" if self._is_unknown(i) else b for i, b in enumerate(self._bytes)]
        rows = [
            [bool(b) and (b.startswith(rest) or rest.startswith(b)) for b in texts]
            for rest in (wanted[s:] for s in range(len(wanted)))
        ]
        return np.array([*rows, [True] * self.vocab_size])

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """int32[V]: how many bytes of text each id stands for; 0 for control ids."""
        return np.array([len(spelling) for spelling in self._bytes], np.int32)

    # -- what it is ------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all that decides the ids of a text; not of the file's name or history."""
        identity = [*spm_file.split(self._model)[0], *self._settings]
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """What to write beside weights that speak these ids: {name: content}."""
        return {"tokenizer.model": self._model}

    # -- inside ----------------------------------------------------------------------------------

    def _ids_of(self, text: str, trusting: bool) -> list[int]:
        return (self._trusting if trusting else self._guarded).encode(text.encode())

    def _never_merges(self, token: int) -> bool:
        """True for a piece that is one byte: text after it never changes it."""
        return self._trusting.is_byte(token)

    def _is_unknown(self, token: int) -> bool:
        return self._trusting.is_unknown(token)

    def _spelling(self, token: int, control_text: bool = False) -> bytes:
        """The bytes of text that a token stands for."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"id {token} is not one of the {self.vocab_size} of {self.path}")
        if control_text and token in self._names:
            return self._names[token].replace(SPACE, " ").encode()
        return self._bytes[token]

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if token in self._names or self._trusting.is_control(token):
            return b""
        if self._trusting.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        if self._trusting.is_unknown(token):
            return self._settings.unknown
        return piece.replace(SPACE, " ").encode()


def beside(folder: str | os.PathLike) -> epath.Path | None:
    """The tokenizer that lies in `folder`: its tokenizer.model, or else its tokenizer.json."""
    places = (epath.Path(folder) / name for name in ("tokenizer.model", "tokenizer.json"))
    return next((place for place in places if place.exists()), None)


def _guarded(model: bytes, ids: set[int | None]) -> bytes:
    """The model with the pieces `ids` made control pieces, which no text ever becomes."""
    pieces, rest = spm_file.split(model)
    for i in ids - {None}:
        pieces[i] = spm_file.as_kind(pieces[i], spm_file.CONTROL)
    return spm_file.join(pieces, rest)
