"""data/ahead.py, data/materialise.py: the stream of batches is the same with rows written ahead."""

import json
import logging
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import corpus_fixture
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_mix import digest

from codellama_jax.data import ahead, corpus, materialise, mix
from codellama_jax.data.rows import pack

STEPS = 40  # of 8 rows: the small corpora are read more than once


@pytest.fixture
def corpus_dir(tmp_path):
    """A copy of the small corpus, to write rows into."""
    folder = tmp_path / "corpus"
    for path in corpus_fixture.prepared().folder.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(corpus_fixture.prepared().folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
    return folder


def prepare(corpus_dir, data, **options):
    options = {"steps": STEPS} | options
    return materialise.prepare(data, corpus_dir, corpus_fixture.tokenizer(), **options)


def stream(corpus_dir, data, **options) -> str:
    tokenizer, options = corpus_fixture.tokenizer(), {"steps": STEPS} | options
    return digest(list(mix.batches(data, corpus_dir, tokenizer, **options)))


def refuse_to_make(monkeypatch):
    """From here on no row of the stage is made: what is read comes from files."""

    def row(self, index):
        raise AssertionError(f"row {index} is made")

    monkeypatch.setattr(ahead, "check_code", lambda *_: None)
    monkeypatch.setattr(mix.Rows, "row", row)
    monkeypatch.setattr(mix.DialogueRows, "row", row)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), min_size=1, max_size=9)),
    st.integers(0, 5),
    st.sampled_from(["<u2", "<u4"]),
)
def test_a_row_is_what_is_read_back(segments, padding, dtype):
    capacity = sum(map(len, segments)) + padding
    ids = [[token for token, _ in segment] for segment in segments]
    targets = [[counts for _, counts in segment] for segment in segments]
    row = pack(ids, capacity=capacity, targets=targets)
    again = ahead.decode(ahead.encode(row, np.dtype(dtype)), np.dtype(dtype), capacity)
    assert row.keys() == again.keys()
    for name in row:
        assert row[name].dtype == again[name].dtype and (row[name] == again[name]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attend_across_documents": True, "already": {"code": 100_000}},
        {"mix": {"dialogues": 0.9, "code": 0.1}, "seq_len": 200, "batch_tokens": 800},
    ],
)
def test_the_stream_is_the_same_with_rows_written_ahead(corpus_dir, monkeypatch, changes):
    plain = corpus_fixture.data(**changes)
    data = replace(plain, rows="rows")
    expected = stream(corpus_dir, plain)
    manifest = prepare(corpus_dir, data, epochs=99)
    assert sum(of["rows"] for of in manifest["corpora"].values()) == STEPS * data.rows_per_batch
    refuse_to_make(monkeypatch)
    assert stream(corpus_dir, data) == expected
    halves = [
        mix.batches(
            data,
            corpus_dir,
            corpus_fixture.tokenizer(),
            steps=STEPS,
            start_step=5,
            process_index=index,
            process_count=2,
        )
        for index in range(2)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*halves, strict=True)
    ]
    monkeypatch.undo()
    assert digest(joined) == stream(corpus_dir, plain, start_step=5)


def test_rows_of_later_epochs_and_of_other_corpora_are_made_while_they_are_read(corpus_dir):
    data = corpus_fixture.data(mix={"language": 0.5, "code_language": 0.5}, rows="rows")
    prepare(corpus_dir, data)
    other = corpus_fixture.data(mix={"language": 0.9, "code": 0.1}, rows="rows")
    mixture = mix.open_mixture(other, corpus_dir, corpus_fixture.tokenizer())
    code, language = mixture.written
    assert code is None and language.count == mixture.rows[1].rows_per_epoch
    assert mixture.epochs(STEPS)["language"] > 2
    assert stream(corpus_dir, other) == stream(corpus_dir, replace(other, rows=None))


def test_any_number_of_workers_and_any_kill_write_the_same(corpus_dir, monkeypatch):
    data = corpus_fixture.data(rows="one")
    monkeypatch.setattr(materialise, "SHARD_TOKENS", 64 * 20)
    one = prepare(corpus_dir, data)["files"]
    assert len(one) > 8
    write, calls = corpus.Writer.write, []

    def killed(self, line):
        calls.append(line)
        if len(calls) == 70:
            raise KeyboardInterrupt
        write(self, line)

    data = replace(data, rows="other")
    monkeypatch.setattr(corpus.Writer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_dir, data)
    monkeypatch.setattr(corpus.Writer, "write", write)
    whole = sorted(path.name for path in (corpus_dir / "other").glob("*.array_record"))
    assert len(whole) == 3
    with pytest.raises(ValueError, match="holds no finished rows"):
        stream(corpus_dir, data)
    before = [(corpus_dir / "other" / name).stat().st_ino for name in whole]
    assert prepare(corpus_dir, data)["files"] == one
    assert [(corpus_dir / "other" / name).stat().st_ino for name in whole] == before
    assert not list((corpus_dir / "other").glob("*.tmp"))
    assert prepare(corpus_dir, data)["files"] == one  # and finds its work done
    assert prepare(corpus_dir, replace(data, rows="two"), workers=2)["files"] == one


def test_rows_for_other_settings_are_refused_with_what_differs(corpus_dir):
    data = corpus_fixture.data(rows="rows")
    prepare(corpus_dir, data, steps=2)
    for changes, message in (
        ({"seq_len": 32, "batch_tokens": 256}, "seq_len is 64 there, 32 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"spm_rate": 0.25}, "spm_rate is 0.5 there, 0.25 here"),
        ({"mix": {"language_x": 1.0}}, "no corpus 'language_x'"),
        ({"mix": {"python": 1.0}}, "has no effect: .* the mix is of python"),
        ({"rows": "nowhere"}, "nowhere holds no finished rows"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(corpus_dir, replace(data, **changes))
    with pytest.raises(ValueError, match="are asked for; name another folder"):
        prepare(corpus_dir, data, steps=3)
    with pytest.raises(ValueError, match="holds something else"):
        prepare(corpus_dir, replace(data, rows="code"))
    with pytest.raises(ValueError, match="rows='' is no folder"):
        corpus_fixture.data(rows="")
    path = corpus_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["code/train.lengths.npy"]["sha256"] = "0" * 64
    path.unlink()
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="corpus is .* there, .* here"):
        stream(corpus_dir, data)


def test_a_missing_or_shorter_shard_is_refused(corpus_dir):
    data = corpus_fixture.data(rows="rows")
    prepare(corpus_dir, data, steps=2)
    shard = corpus_dir / "rows" / "code-00000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="code-00000.array_record has .* bytes, not"):
        stream(corpus_dir, data)
    shard.unlink()
    with pytest.raises(ValueError, match="code-00000.array_record is missing"):
        stream(corpus_dir, data)


def test_a_damaged_row_is_made_anew_and_told_once(corpus_dir, caplog):
    data = corpus_fixture.data(rows="rows")
    prepare(corpus_dir, data)
    shard = corpus_dir / "rows" / "code-00000.array_record"
    content = bytearray(shard.read_bytes())
    content[20_000:20_008] = bytes(8)  # within a record: the file can still be opened
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert stream(corpus_dir, data) == stream(corpus_dir, replace(data, rows=None))
    assert len(caplog.records) == 1 and "cannot be read and is made anew" in caplog.text


def test_rows_that_the_code_would_make_otherwise_are_refused(corpus_dir, monkeypatch):
    data = corpus_fixture.data(rows="rows")
    prepare(corpus_dir, data, steps=2)
    row = mix.Rows.row
    monkeypatch.setattr(mix.Rows, "row", lambda self, index: row(self, index + 1))
    with pytest.raises(ValueError, match="this version of the code would make otherwise"):
        stream(corpus_dir, data)


def test_the_tool_writes_what_a_recipe_reads(tmp_path, monkeypatch, capsys):
    recipe = Path(__file__).parents[1] / "recipes" / "nano.py"
    tool = Path(__file__).parents[1] / "tools" / "prepare_rows.py"
    os.link(corpus_fixture.tokenizer().path, tmp_path / "tokenizer.model")
    prepared = corpus_fixture.prepared().folder

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(tool), "--workdir", str(tmp_path), *args])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(tool), run_name="__main__")
        return left.value.code, *capsys.readouterr()

    (tmp_path / "corpus").symlink_to(prepared)
    stage = ("--recipe", str(recipe), "--stage", "code", "--set", "steps=40")
    stage += ("--set", "optim.warmup_steps=1", "--set", "data.batch_tokens=1024")
    status, _, err = run(*stage)
    assert status == 1 and "name the folder to write" in err
    rows = str(tmp_path / "rows")
    status, out, err = run(*stage, "--set", f"data.rows={rows}", "--epochs", "2")
    assert (status, err) == (0, "") and "train with --set data.rows=" in out
    data = corpus_fixture.data(
        mix={"code": 0.60, "code_files": 0.25, "code_language": 0.08, "language": 0.07},
        seq_len=256,
        batch_tokens=1_024,
        line_rate=0.7,
    )
    assert stream(prepared, replace(data, rows=rows)) == stream(prepared, data)
    assert run(*stage, "--size", "7b")[0] == 1 and run("--recipe", "no.py", "--stage", "x")[0] == 1
