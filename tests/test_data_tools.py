"""tools/prepare_corpus.py and tools/look_at_batch.py, as a person uses them."""

import os
import runpy
import sys
from pathlib import Path

import corpus_fixture
import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a tool; returns its exit status, output and errors."""

    def call(tool: str, *args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, args)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        return left.value.code, *capsys.readouterr()

    return call


def test_a_corpus_is_prepared_from_a_tree_and_looked_at(run, tmp_path):
    tokenizer = corpus_fixture.tokenizer().path
    prepare = ("prepare_corpus.py", "--out", tmp_path / "corpus", "--tokenizer", tokenizer)
    tree = ("--input", corpus_fixture.tree(), "--workers", 1)
    status, out, _ = run(*prepare, *tree)
    assert status == 0 and "held out" in out and "empty.py" in out and "dialogues" in out
    assert run(*prepare, *tree)[0] == 0

    look = ("look_at_batch.py", "--corpus", tmp_path / "corpus", "--tokenizer", tokenizer)
    mix = ("--mix", "code=0.9", "language=0.1", "--seq-len", 512, "--rows", 4, "--infilling", 0.9)
    status, out, _ = run(*look, *mix, "--step", 1)
    assert status == 0 and out.count("row ") == 4
    assert "module_" in out and "python, unknown; " in out
    status, out, _ = run(*look, *mix, "--step", 1, "--row", 2, "--text")
    assert status == 0 and out.startswith("row 2: code") and "      | " in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--input", "/nowhere"), "error: /nowhere is neither a file nor a directory"),
        (("--heldout-rate", "2"), "error: heldout_rate=2.0 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_prepared_ends_in_one_sentence(run, tmp_path, args, message):
    tokenizer = corpus_fixture.tokenizer().path
    status, _, err = run(
        "prepare_corpus.py", "--out", tmp_path / "corpus", "--tokenizer", tokenizer, *args
    )
    assert status == 1 and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "corpus").exists()


def test_a_batch_that_cannot_be_shown_ends_in_one_sentence(run):
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer().path
    look = ("look_at_batch.py", "--corpus", folder, "--tokenizer", tokenizer, "--step", 0)
    status, _, err = run(*look, "--mix", "rust=1", "--seq-len", 64)
    assert status == 1 and "has no corpus 'rust'; it has code, python" in err
    status, _, err = run(*look, "--mix", "code", "--seq-len", 64)
    assert status == 1 and "write NAME=SHARE" in err
    status, _, err = run(*look, "--mix", "code=1", "--seq-len", 64, "--row", 9)
    assert status == 1 and "the batch has rows 0 to 7" in err


def test_looking_takes_no_accelerator(run, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    run("look_at_batch.py", "--help")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_a_file_is_found_and_a_stage_planned(run):
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer().path
    look = ("look_at_batch.py", "--corpus", folder, "--tokenizer", tokenizer, "--seq-len", 64)
    mix = ("--mix", "code=0.9", "language=0.1", "--rows", 4, "--steps", 100)
    status, out, _ = run(*look, *mix, "--find", "package1/module_1.py")
    assert status == 0 and "package1/module_1.py is read in" in out and "code, epoch 0" in out
    status, out, _ = run(*look, *mix, "--plan", "--tokens-per-second", 1000)
    assert status == 0 and "100 steps of 256 tokens: 25,600 tokens" in out
    assert "90.000%" in out and "10.000%" in out and "days at 1,000 tokens/s" in out


def test_a_corpus_is_prepared_from_inputs(run, tmp_path):
    tokenizer = corpus_fixture.tokenizer().path
    prepare = ("prepare_corpus.py", "--out", tmp_path / "corpus", "--tokenizer", tokenizer)
    large = ("--workers", 1, "--input", corpus_fixture.tree(), "--filter", "alphanumeric=0.1")
    status, out, _ = run(*prepare, *large)
    assert status == 0 and "held out" in out and "empty" in out
    status, _, err = run(*prepare, *large, "--filter", "lines=3")
    assert status == 1 and "--filter lines=3: write NAME=VALUE, of file_bytes, line_chars" in err
    status, _, err = run(*prepare, *large, "--without", "dialogues")
    assert status == 1 and "was prepared with other settings" in err
