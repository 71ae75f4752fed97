"""A tree of source files that the tests write, a vocabulary trained on it, and a corpus of both."""

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

from codellama_jax import config
from codellama_jax.data import corpus, pipeline
from codellama_jax.data.inputs import Input
from codellama_jax.tokenizer import Tokenizer
from codellama_jax.tokenizer.training import train

VERBS = "read write open close parse print count merge split move find drop keep fold walk".split()
NOUNS = "file line word tree node list table row page name value key path event frame".split()
NUM_FILES = 40


def write_tree(folder: Path, *, num_files: int = NUM_FILES) -> Path:
    """Documented Python modules, a C file, a CRLF file, an empty file, and prose."""
    rng = random.Random(0)
    for number in range(num_files):
        path = folder / f"package{number % 4}" / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_module(rng, number))
        prose = folder / "docs" / f"page_{number}.md"
        prose.parent.mkdir(exist_ok=True)
        prose.write_text("\n\n".join(_sentences(rng) for _ in range(6)) + "\n")
    (folder / "windows.py").write_bytes(_module(rng, 99).replace("\n", "\r\n").encode())
    (folder / "empty.py").write_text("")
    (folder / "main.c").write_text(
        "#include <stdio.h>\n\nint add(int a, int b)\n{\n    return a + b;\n}\n\n"
        'int main(void)\n{\n    printf("%d\\n", add(1, 2));\n    return 0;\n}\n'
    )
    return folder


@functools.cache
def tree() -> Path:
    return write_tree(new_folder())


def request(**changes) -> pipeline.Request:
    options = {"inputs": (Input(str(tree())),), "heldout_rate": 0.1, "function_chars": 300}
    return pipeline.Request(**options | changes)


@functools.cache
def training_texts(*names: str) -> list[str]:
    """Of the corpora of `request`."""
    return list(pipeline.training_texts(new_folder(), request(), list(names)))


@functools.cache
def tokenizer() -> Tokenizer:
    path = new_folder() / "tokenizer.model"
    train(training_texts("code", "language"), 512, path)
    return Tokenizer(path)


@functools.cache
def other_tokenizer() -> Tokenizer:
    path = new_folder() / "other.model"
    train(training_texts("code"), 400, path)
    return Tokenizer(path)


@functools.cache
def prepared() -> corpus.Corpus:
    return pipeline.prepare(new_folder(), tokenizer(), request())


def new_folder() -> Path:
    """A folder for what is made once for all tests; removed when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="codellama-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def data(**changes) -> config.Data:
    """Settings of a small stage on the prepared corpus."""
    settings = {
        "mix": {"code": 0.85, "code_language": 0.08, "language": 0.07},
        "seq_len": 64,
        "batch_tokens": 8 * 64,
        "infilling_rate": 0.9,
    }
    return config.Data(**settings | changes)


def _module(rng: random.Random, number: int) -> str:
    functions = [_function(rng) for _ in range(6)]
    methods = [_indented(_function(rng, method=True)) for _ in range(4)]
    head = f'"""Module {number}: {_sentences(rng)}"""\n\nimport os\n\n# Größe 大小 😀\nSIZE = 1\n'
    title = f'class Reader{number}:\n    """{_sentences(rng)}"""\n'
    return "\n\n".join([head, *functions, "\n".join([title, *methods])])


def _function(rng: random.Random, *, method: bool = False) -> str:
    verb, noun, other = rng.choice(VERBS), rng.choice(NOUNS), rng.choice(NOUNS)
    lines = [
        f"    {rng.choice(NOUNS)}_{i} = {verb}({noun}, {rng.randrange(100)})" for i in range(3)
    ]
    return (
        f"def {verb}_{noun}_{rng.randrange(1000)}({'self, ' * method}{noun}, {other}=None):\n"
        f'    """{_sentences(rng)}"""\n' + "\n".join(lines) + f"\n    return {noun}\n"
    )


def _indented(text: str) -> str:
    return "".join("    " + line for line in text.splitlines(keepends=True))


def _sentences(rng: random.Random) -> str:
    return " ".join(
        f"{rng.choice(VERBS).title()} the {rng.choice(NOUNS)} of every {rng.choice(NOUNS)} "
        f"before you {rng.choice(VERBS)} it."
        for _ in range(2)
    )
