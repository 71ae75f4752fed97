"""Documents out of documents: functions, paragraphs, docstrings, and dialogues made of both.

A nano model's row holds 256 tokens, so it learns from functions where a large one learns from
files. A docstring is natural language about code; a docstring that asks and the function that
answers it are a dialogue.
"""

import ast
import functools
import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

from codellama_jax import prompts
from codellama_jax.data.sources import Document

MIN_CHARS = 80  # smaller pieces are joined with the next one
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(document: Document, *, max_chars: int) -> list[Document]:
    """The top-level blocks of a source file, in order: a function or class with what is above it.

    A Python class longer than max_chars becomes its head and its methods, each below the line
    `class Name:`. In other languages a block starts at a line without indentation after a blank
    one. Blocks longer than max_chars are cut between lines, short ones joined.
    """
    lines = _lines(document.text)
    tree = _parse(document.text) if document.language == "python" else None
    blocks = _python_blocks(tree, lines, max_chars) if tree else _plain_blocks(lines)
    pieces = [piece for block in blocks for piece in _cut(block, max_chars)]
    return _as_documents(document, _join_short(pieces, max_chars))


def paragraphs(document: Document, *, max_chars: int) -> list[Document]:
    """Prose in pieces of whole paragraphs, each as long as max_chars allows."""
    blocks = [block.strip("\n") + "\n" for block in re.split(r"\n[ \t]*\n", document.text)]
    pieces = [piece for block in blocks if block.strip() for piece in _cut(block, max_chars)]
    return _as_documents(document, _join_short(pieces, max_chars, min_chars=max_chars, gap="\n"))


def docstrings(document: Document, *, max_chars: int) -> list[Document]:
    """The docstrings of a Python file, each below the name and arguments of what it describes."""
    return [
        replace(document, text=text, language="prose", part=f"docstring of {definition.name}")
        for definition in _definitions(document)
        for text in _cut(f"{definition.signature}\n\n{definition.docstring}\n", max_chars)
        if len(definition.docstring) >= MIN_CHARS
    ]


def dialogues(document: Document, *, max_chars: int) -> list[Document]:
    """One dialogue per function with a docstring: the docstring asks, the function answers."""
    found = []
    for definition in _definitions(document):
        summary = definition.docstring.split("\n\n")[0].strip()
        if definition.body is None or len(summary) < 20 or len(definition.body) > max_chars:
            continue
        question = f"Write the Python function {definition.signature}.\n{summary}"
        text = f"{question}\n{definition.body}"
        if any(tag in text for tag in prompts.TAGS):
            continue  # code of a chat program, which chat formats cannot hold
        dialog = (("user", question), ("assistant", definition.body))
        found.append(replace(document, text=text, part=definition.name, dialog=dialog))
    return found


# -- Python -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Definition:
    name: str  # dotted, within its file
    signature: str
    docstring: str
    body: str | None  # a function's source without its docstring; None if it has none of its own


def _definitions(document: Document) -> Iterator[_Definition]:
    """Everything in a Python file that has a docstring, in order."""
    tree = _parse(document.text) if document.language == "python" else None
    if tree is None:
        return
    lines = _lines(document.text)
    module = document.path.removesuffix(".py").replace("/", ".")
    if docstring := ast.get_docstring(tree):
        yield _Definition(module, f"module {module}", docstring, None)
    stack = [(node, "") for node in reversed(tree.body)]
    while stack:
        node, prefix = stack.pop()
        if not isinstance(node, DEFINITIONS):
            continue
        name = prefix + node.name
        is_function = isinstance(node, FUNCTIONS)
        if docstring := ast.get_docstring(node):
            signature = f"{name}({ast.unparse(node.args)})" if is_function else f"class {name}"
            body = _without_docstring(node, lines) if is_function else None
            yield _Definition(name, signature, docstring, body)
        if not is_function:
            stack += [(child, f"{name}.") for child in reversed(node.body)]


def _without_docstring(node: ast.FunctionDef, lines: list[str]) -> str | None:
    """The function's source less its docstring; None where nothing else is in it."""
    docstring = node.body[0]
    alone = (
        docstring.lineno > node.lineno
        and not lines[docstring.lineno - 1][: docstring.col_offset].strip()
    )
    if len(node.body) < 2 or not alone or node.body[1].lineno <= docstring.end_lineno:
        return None
    kept = (
        lines[_first_line(node) : docstring.lineno - 1]
        + lines[docstring.end_lineno : node.end_lineno]
    )
    source = textwrap.dedent("".join(kept)).strip("\r\n")
    return None if source[0].isspace() else source  # a string in it begins further left


def _python_blocks(tree: ast.Module, lines: list[str], max_chars: int) -> Iterator[str]:
    """Every line of a Python file once: statements in runs, functions and classes one by one.

    A long class comes as its head and its methods, each below the class's first line.
    """
    for node, begin, end in _runs(tree.body, 0, len(lines)):
        block = "".join(lines[begin:end])
        members = node.body if isinstance(node, ast.ClassDef) and len(block) > max_chars else []
        first = next((i for i, n in enumerate(members) if isinstance(n, DEFINITIONS)), 0)
        if first == 0:  # short, or nothing that could be a head
            yield block
            continue
        head_end = members[first - 1].end_lineno
        head = "".join(lines[begin:head_end])
        title = "".join(lines[node.lineno - 1 : members[0].lineno - 1])
        for _, begin_method, end_method in _runs(members[first:], head_end, end):
            method = "".join(lines[begin_method:end_method])
            if head and len(head) + len(method) <= max_chars:
                yield head + method
            else:
                if head:
                    yield head
                beginning, *rest = _cut(method, max_chars - len(title))
                yield title + beginning.lstrip("\r\n")
                yield from rest
            head = ""


def _runs(nodes: list[ast.stmt], start: int, stop: int) -> Iterator[tuple[ast.stmt, int, int]]:
    """Splits the lines [start, stop) around each definition: its first statement, begin and end.

    What stands above a statement belongs to it.
    """
    first = None
    for before, node in zip([None, *nodes], nodes, strict=False):
        if before and (isinstance(node, DEFINITIONS) or isinstance(before, DEFINITIONS)):
            yield first, start, before.end_lineno
            first, start = None, before.end_lineno
        first = first or node
    if first:
        yield first, start, stop


def _first_line(node: ast.FunctionDef) -> int:
    """Index of the first line of a definition, decorators included."""
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1


@functools.lru_cache(maxsize=1)  # a file is parsed once for its functions, docstrings, dialogues
def _parse(text: str) -> ast.Module | None:
    """The syntax tree, or None for what this Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about somebody else's source
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


# -- any text ---------------------------------------------------------------------------------


def _lines(text: str) -> list[str]:
    """Lines with their ends, where Python's own parser ends them (not at form feeds)."""
    return list(io.StringIO(text, newline=""))


def _plain_blocks(lines: list[str]) -> list[str]:
    """Cuts before every line without indentation that follows a blank one."""
    blocks, block = [], []
    for line in lines:
        after_blank = block and not block[-1].strip()
        if after_blank and line.strip() and not line[0].isspace() and line[0] not in "})]":
            blocks.append("".join(block))
            block = []
        block.append(line)
    return [*blocks, "".join(block)]


def _cut(block: str, max_chars: int) -> list[str]:
    """Halves a block that is too long until it is not: best at a blank line or low indentation."""
    lines = _lines(block)
    if len(block) <= max_chars or len(lines) < 2:
        return [block]
    best, cost, position = len(lines) // 2, float("inf"), 0
    for number, line in enumerate(lines[:-1], 1):
        position += len(line)
        following = lines[number]
        indentation = len(following) - len(following.lstrip())
        off_centre = abs(2 * position - len(block)) / len(block)  # 0 in the middle, 1 at an end
        price = off_centre * 20 + min(indentation, 12) - 4 * (not line.strip())
        if price < cost and following.strip():
            best, cost = number, price
    return _cut("".join(lines[:best]), max_chars) + _cut("".join(lines[best:]), max_chars)


def _join_short(
    pieces: list[str], max_chars: int, *, min_chars: int = MIN_CHARS, gap: str = ""
) -> list[str]:
    """Joins each piece shorter than min_chars with the next (the last with the one before).

    Where both together are longer than max_chars they stay apart.
    """
    joined: list[str] = []
    for number, piece in enumerate(pieces, 1):
        last = joined[-1] if joined else None
        short = last is not None and (
            len(last) < min_chars or (number == len(pieces) and len(piece) < min_chars)
        )
        if short and len(last) + len(gap) + len(piece) <= max_chars:
            joined[-1] = last + gap + piece
        else:
            joined.append(piece)
    return joined


def _as_documents(document: Document, pieces: list[str]) -> list[Document]:
    """Pieces as documents, numbered, without blank lines at their ends; not the tiniest."""
    return [
        replace(document, text=piece.strip("\r\n\f") + "\n", part=f"part {number}")
        for number, piece in enumerate(pieces, 1)
        if len(piece.strip()) >= MIN_CHARS // 4
    ]
