"""The tokens of a document: BOS, its text in chunks, EOS.

A row that cuts a megabyte document needs a few thousand of its tokens. So a document is encoded in
chunks that end with a line, about 4,096 characters each; no piece of Llama's vocabulary goes beyond
a newline, so the chunks' tokens are the tokens of the whole text, and a slice of a document is
encoded from the chunks it touches. How many tokens each chunk has is counted once, when the corpus
is prepared.
"""

from bisect import bisect_right
from itertools import accumulate

CHUNK_CHARS = 4_096


def chunks(text: str) -> list[str]:
    """Cuts text after the first newline at or beyond every 4,096 characters; at least one."""
    pieces, start = [], 0
    while len(text) - start > CHUNK_CHARS:
        end = text.find("\n", start + CHUNK_CHARS - 1) + 1
        if end == 0:
            break
        pieces.append(text[start:end])
        start = end
    return pieces + [text[start:]] if start < len(text) or not pieces else pieces


def encode(tokenizer, text: str) -> list[int]:
    """All tokens of a document, BOS and EOS included."""
    ids = [tokenizer.bos_id]
    for number, chunk in enumerate(chunks(text)):
        ids += _encode_chunk(tokenizer, number, chunk)
    return ids + [tokenizer.eos_id]


def count(tokenizer, text: str) -> list[int]:
    """Tokens of every chunk. The document has their sum and 2 more."""
    pieces = chunks(text)
    return [len(_encode_chunk(tokenizer, number, chunk)) for number, chunk in enumerate(pieces)]


def encode_slice(tokenizer, text: str, chunk_tokens: list[int], start: int, end: int) -> list[int]:
    """encode(tokenizer, text)[start:end], encoding only the chunks it touches.

    chunk_tokens: count(tokenizer, text). Raises ValueError where they are not that.
    """
    pieces = chunks(text)
    first_tokens = list(accumulate(chunk_tokens, initial=1))  # of every chunk; the last is EOS
    first = max(bisect_right(first_tokens, start) - 1, 0)
    ids, offset = ([tokenizer.bos_id], 0) if start == 0 else ([], first_tokens[first])
    as_counted = len(pieces) == len(chunk_tokens)
    for number in range(first, len(pieces)):
        if not as_counted or first_tokens[number] >= end:
            break
        chunk = _encode_chunk(tokenizer, number, pieces[number])
        as_counted = len(chunk) == chunk_tokens[number]
        ids += chunk
    if not as_counted:
        raise ValueError("the text has other tokens than were counted")
    if end > first_tokens[-1]:
        ids.append(tokenizer.eos_id)
    return ids[start - offset : end - offset]


def _encode_chunk(tokenizer, number: int, chunk: str) -> list[int]:
    """The first chunk is encoded like a text; the later ones without the leading space."""
    return tokenizer.encode_infilling(chunk) if number else tokenizer.encode(chunk)
