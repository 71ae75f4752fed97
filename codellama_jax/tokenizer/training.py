"""A small vocabulary, trained on some texts and put together as Llama's is."""

import io
import os
import re
from collections.abc import Iterable

import sentencepiece

from codellama_jax import whole
from codellama_jax.tokenizer import spm_file
from codellama_jax.tokenizer.face import INFILLING_PIECES, SMILEY, SPACE

WHITESPACE_PIECES = tuple(SPACE * n for n in range(2, 17))  # Llama has each up to 16
_LAST = -1e9  # score of whitespace pieces in Llama: they merge after all others
_MAX_CHARS = 32_000_000  # of training text, about four seconds


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> None:
    """Trains a vocabulary with Llama's settings plus the infilling marks and writes it to `path`.

    Byte-pair merges; digits apart; unknown characters as bytes; newline and tab always as bytes;
    no normalisation; 0 <unk>, 1 <s>, 2 </s>, then 256 bytes. vocab_size counts all pieces. The last
    four are ▁<PRE> ▁<SUF> ▁<MID> ▁<EOT>. Equal texts give an equal file. A few megabytes of text
    are plenty; of more than 32 million characters every n-th line is used.

    Raises ValueError when the texts are too few, or too many characters, for vocab_size.
    """
    added = len(WHITESPACE_PIECES) + len(INFILLING_PIECES)
    model = _train_merges(_training_lines(texts), vocab_size, vocab_size - added)
    whole.write(path, _with_llamas_pieces(model, vocab_size))


def _training_lines(texts: Iterable[str]) -> list[str]:
    """Lines that hold every word with the space it has inside a document.

    SentencePiece would put a space before each line, but only the first line of a document has
    one; and an indent, which Llama cuts apart from its last space (▁▁▁ ▁return), would be
    learned as one with its word. So the space is left to us, and runs of spaces are shortened:
    of U+2581 too, which is a space to SentencePiece, or a run of both would be learned as the
    piece that is given.
    """
    lines = [line for text in texts for line in re.split(r"[\n\t]", " " + text)]
    stride = -(-sum(map(len, lines)) // _MAX_CHARS) or 1
    unlearned = re.compile("|".join([SMILEY, *(name.strip(SPACE) for name in INFILLING_PIECES)]))
    some = [line for line in lines[::stride] if not unlearned.search(line)]
    return [re.sub(f"[ {SPACE}]+", " ", line) for line in some]


def _train_merges(lines: list[str], vocab_size: int, num_learned: int) -> bytes:
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=num_learned,
            model_type="bpe",
            character_coverage=0.9995,  # Llama: 0.99995; rare characters would fill half of a nano
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # see _training_lines; the finished model has it
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit the {len(lines)} lines of text to train on. "
            f"{vocab_size - num_learned} pieces are given; of the other {num_learned} "
            f"SentencePiece says: {error}"
        ) from error
    return written.getvalue()


def _with_llamas_pieces(model: bytes, vocab_size: int) -> bytes:
    """A trained model with whitespace pieces after the bytes and the infilling marks at the end."""
    pieces, rest = spm_file.split(model)
    num_special = 3 + 256  # <unk>, <s>, </s> and the bytes
    spaces = [spm_file.piece(text, _LAST, spm_file.NORMAL) for text in WHITESPACE_PIECES]
    marks = [spm_file.piece(text, 0.0, spm_file.USER_DEFINED) for text in INFILLING_PIECES]
    pieces = pieces[:num_special] + spaces + pieces[num_special:] + marks
    model = spm_file.join(pieces, rest)
    return spm_file.with_settings(model, vocab_size=vocab_size, puts_space=True)
