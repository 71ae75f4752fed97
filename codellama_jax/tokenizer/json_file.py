"""Tokenizers that are a tokenizer.json, as Hugging Face's folders hold them: the same face.

Read by the tokenizers library (`pip install codellama_jax[hf]`), which knows how a text becomes
ids. The other way is ours: the bytes of each id are known from the file, so that decoding loses
nothing and streams. Two kinds have such bytes:

byte-level BPE   every byte is written as a character (GPT-2's table); a text begins as it is
SentencePiece's  U+2581 is a space, <0x0A> a byte; mostly a space is put before a text

Other kinds are refused: they lose spaces or unknown characters. What the file itself loses stays
lost: characters that it normalises, and bytes that its vocabulary lacks (SmolLM2's has not U+0004).
"""

import hashlib
import json
import os
import re
from functools import cached_property

from etils import epath

from codellama_jax.tokenizer.face import CONTROL_PIECES, INFILLING_PIECES, SMILEY, SPACE, Tokenizer

UNKNOWN = " \u2047 ".encode()  # what <unk> decodes to, as in SentencePiece
CONFIG = "tokenizer_config.json"
# Code Llama's marks and building pieces are no merges of others, so of NEVER_FROM_TEXT only what
# is an added token can come from a text; the library keeps those out that are special.


class JsonTokenizer(Tokenizer):
    """A vocabulary from a tokenizer.json; made by Tokenizer(path).

    BOS and EOS are those that tokenizer_config.json beside it names; else <s> and </s>, or
    <|endoftext|>. A vocabulary without BOS begins its documents with EOS.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises ValueError for a file that is missing, damaged or of another kind, and without
        the tokenizers library."""
        self.path = os.fspath(path)
        self._text, self._content = _read(self.path)
        self._trusting = _load(self.path, self._text)
        self._guarded = _load(self.path, json.dumps(_without_marks(self._content)))
        self._guarded.encode_special_tokens = True  # special tokens in a text are text
        added = {token["id"]: token for token in self._content.get("added_tokens", [])}
        ids = _ids(self._content)
        self.vocab_size = 1 + max(ids.values())
        pieces = [""] * self.vocab_size  # an id may have no piece
        for piece, i in ids.items():
            pieces[i] = piece
        self._set_pieces(pieces)
        self.bos_id, self.eos_id = _ends(self.path, ids)
        if self.eos_id is None:
            raise ValueError(
                f"{self.path} has no end of text: {CONFIG} beside it must name its eos_token"
            )
        self._byte_level = _is_byte_level(self.path, self._content)
        self._unknown = ids.get(self._content["model"].get("unk_token"))
        self._special = {i for i, token in added.items() if token["special"]}
        self._special |= {ids[piece] for piece in CONTROL_PIECES if piece in ids}
        self._bytes = [self._bytes_of(i, p, i in added) for i, p in enumerate(pieces)]
        self.puts_space = self._spell("a") == b" a"
        self._num_smiley_ids = len(self.encode(SMILEY)) if self.puts_space else 0
        with_marks = self._trusting.encode("a", add_special_tokens=True).ids
        self.begins_with_bos = with_marks[:1] == [self.bos_id]

    def encode_infilling(self, text: str, control_text: bool = False) -> list[int]:
        """Ids of a text that continues another: no space is put before it (section 2.3)."""
        if self.puts_space:
            return super().encode_infilling(text, control_text)
        return self.encode(text, control_text=control_text)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all that decides the ids of a text."""
        return fingerprint(self.path)

    def files(self) -> dict[str, bytes]:
        beside = epath.Path(self.path).parent / CONFIG
        ends = {"bos_token": self._pieces[self.bos_id], "eos_token": self._pieces[self.eos_id]}
        settings = beside.read_bytes() if beside.exists() else json.dumps(ends).encode()
        return {"tokenizer.json": self._text.encode(), CONFIG: settings}

    # -- inside ----------------------------------------------------------------------------------

    def _ids_of(self, text: str, trusting: bool) -> list[int]:
        text.encode()  # raises UnicodeEncodeError for a lone surrogate
        library = self._trusting if trusting else self._guarded
        return library.encode(text, add_special_tokens=False).ids

    def _spell(self, text: str) -> bytes:
        return b"".join(self._bytes[i] for i in self._ids_of(text, trusting=False))

    def _never_merges(self, token: int) -> bool:
        return not self._byte_level and _is_byte_piece(self._pieces[token])

    def _is_unknown(self, token: int) -> bool:
        return token == self._unknown

    def _bytes_of(self, token: int, piece: str, is_added: bool) -> bytes:
        if token == self._unknown and not self._byte_level:
            return UNKNOWN
        if token in self._special:
            return b""
        if is_added:
            return piece.encode()
        if self._byte_level:
            return bytes(_BYTES[character] for character in piece)
        if _is_byte_piece(piece):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()


# -- the file --------------------------------------------------------------------------------------


def _read(path: str) -> tuple[str, dict]:
    try:
        text = epath.Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"there is no file {path}; give the path of a tokenizer.json") from error
    try:
        content = json.loads(text)
        found = _ids(content)
        if found and all(type(i) is int for i in found.values()):
            return text.decode(), content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is not a whole tokenizer.json with a vocabulary")


def fingerprint(path: str) -> str:
    """JsonTokenizer.fingerprint, without the library."""
    content = _read(path)[1]
    free = {"version", "truncation", "padding", "post_processor"}
    identity = {name: value for name, value in content.items() if name not in free}
    identity |= {"ends": _ends(path, _ids(content))}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def ids(path: str) -> dict[str, int]:
    """Every piece's id, without the library."""
    return _ids(_read(path)[1])


def ends(path: str) -> tuple[int | None, int | None]:
    """Ids of (BOS, EOS), without the library; None where there is none."""
    return _ends(path, ids(path))


def _ids(content: dict) -> dict[str, int]:
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return content["model"]["vocab"] | added


def _ends(path: str, ids: dict[str, int]) -> tuple[int | None, int | None]:
    settings = _settings(epath.Path(path).parent / CONFIG)
    names = {end: settings.get(f"{end}_token") for end in ("bos", "eos")}
    names = {end: n["content"] if isinstance(n, dict) else n for end, n in names.items()}
    eos = ids.get(names["eos"], ids.get("</s>", ids.get("<|endoftext|>")))
    return ids.get(names["bos"], ids.get("<s>", eos)), eos


def _settings(path: epath.Path) -> dict:
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def _load(path: str, text: str):
    """The library's tokenizer, which encodes texts whole and alone."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{path} needs the tokenizers library: pip install 'codellama_jax[hf]'"
        ) from None
    try:
        loaded = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no error of its own
        raise ValueError(f"{path} is no tokenizer that the library reads: {error}") from None
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _without_marks(content: dict) -> dict:
    """The same for text in which marks are text.

    Our own files (convert/hf_tokenizer.py) put a space not only before a text but also after a
    mark in it; this is the only pattern that names one.
    """
    normalizer = content.get("normalizer") or {}
    steps = [
        step | {"pattern": {"Regex": r"\A(?=[\s\S])"}} if "<PRE>" in str(step) else step
        for step in normalizer.get("normalizers", [])
    ]
    return content | {"normalizer": normalizer | {"normalizers": steps}} if steps else content


def _is_byte_level(path: str, content: dict) -> bool:
    """Which of the two kinds it is. Raises ValueError for a third."""
    model, decoder = content["model"], json.dumps(content.get("decoder"))
    if model.get("type") == "BPE" and '"ByteLevel"' in decoder:
        odd = next((p for p in _trained(content) if not set(p) <= _BYTES.keys()), None)
        if odd is not None:
            raise ValueError(f"{path} is byte-level, but its piece {odd!r} does not spell bytes")
        return True
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return False
    raise ValueError(
        f"{path} is a {model.get('type')} vocabulary that is neither byte-level BPE nor "
        "SentencePiece's BPE with byte fallback; others lose text and are not read"
    )


def _trained(content: dict) -> set[str]:
    added = {token["content"] for token in content.get("added_tokens", [])}
    return content["model"]["vocab"].keys() - added


def _is_byte_piece(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: bytes that print stand for themselves, the others for what follows U+00FF."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_characters()


# -- growing ---------------------------------------------------------------------------------------


def with_infilling(path: str) -> dict:
    """The content of the tokenizer.json at `path` with the four infilling marks as its last ids.

    They are special tokens, called as in Code Llama; trusted text "\u2581<PRE>" becomes one.
    Raises ValueError if one is there already.
    """
    content = _read(path)[1]
    added, taken = content.get("added_tokens", []), _ids(content)
    clash = [mark for mark in INFILLING_PIECES if mark in taken]
    if clash:
        raise ValueError(f"{path} has {clash[0]} already; there is nothing to grow")
    first = 1 + max(taken.values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    marks = [
        {"id": first + n, "content": mark, **plain, "special": True}
        for n, mark in enumerate(INFILLING_PIECES)
    ]
    return content | {"added_tokens": [*added, *marks]}
