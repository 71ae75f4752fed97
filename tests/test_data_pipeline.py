"""data/inputs.py, formats.py, tasks.py and pipeline.py: any input, any workers, any kill."""

import gzip
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus_fixture
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import corpus, inputs, pipeline, tokens
from codellama_jax.data.inputs import Input

WORDS = [f"word{i}" for i in range(3_000)]
LICENCES = ("MIT", "Apache-2.0")


def records(count=120, seed=0):
    """Documents with exact and near-duplicates among them, far from each other."""
    rng = random.Random(seed)
    texts = [
        "\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(rng.randrange(8, 25)))
        for _ in range(count)
    ]
    for number in range(0, count // 2, 10):
        texts[count - 1 - number] = texts[number]
        texts[count - 2 - number] = texts[number + 1] + " and three more"
    return [
        {
            "text": text + "\n",
            "path": f"src/file{number}.{'py' if number % 3 else 'md'}",
            "language": "Python" if number % 3 else "markdown",
            "license": LICENCES[number % 2],
        }
        for number, text in enumerate(texts)
    ]


def write_json_lines(path: Path, rows) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tree, a JSONL file and a packed one."""
    folder = tmp_path_factory.mktemp("sources")
    rows = records()
    write_json_lines(folder / "a.jsonl", rows[:80])
    write_json_lines(folder / "b.jsonl.gz", rows[80:])
    corpus_fixture.write_tree(folder / "tree", num_files=8)
    return folder


def request(folder: Path, **changes) -> pipeline.Request:
    named = [Input(str(folder / name)) for name in ("a.jsonl", "b.jsonl.gz", "tree")]
    options = {"inputs": tuple(named), "unit_bytes": 20_000, "heldout_rate": 0.1, "forms": ()}
    return pipeline.Request(**options | changes)


def prepare(out, asked, **options) -> corpus.Corpus:
    return pipeline.prepare(out, corpus_fixture.tokenizer(), asked, **options)


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared") / "corpus", request(sources))


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def documents(prepared, name="code"):
    for which in corpus.SPLITS:
        split = prepared.split(name, which)
        yield from (split.record(number) for number in range(len(split)))


# -- the same bytes ---------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_bytes(prepared, sources, tmp_path):
    again = prepare(tmp_path / "corpus", request(sources), workers=3)
    assert content(again.folder) == content(prepared.folder)
    assert len(prepared.manifest["corpora"]["code"]["train"]["records"]) > 3


@pytest.mark.parametrize("kill_at", [1, 6, 12, 30])
def test_a_run_that_was_interrupted_goes_on(prepared, sources, tmp_path, kill_at):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "corpus", request(sources), progress=interrupt)
    with pytest.raises(ValueError, match="not a prepared corpus"):
        corpus.open(tmp_path / "corpus")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "corpus" / "work").iterdir()}
    assert sum(name.count("-") for name in before) == kill_at
    again = prepare(tmp_path / "corpus", request(sources))
    assert content(again.folder) == content(prepared.folder)


KILLED = """
import multiprocessing, os, runpy, signal, sys
from codellama_jax.data import pipeline
def progress(task, done, total):
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
prepare = pipeline.prepare
pipeline.prepare = lambda *args, **options: prepare(*args, **options | {"progress": progress})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_process_leaves_only_whole_shards_behind(prepared, sources, tmp_path):
    """It is killed as soon as the first of its tasks is done."""
    tool = Path(__file__).parents[1] / "tools" / "prepare_corpus.py"
    names = ("a.jsonl", "b.jsonl.gz", "tree")
    command = [tool, "--tokenizer", corpus_fixture.tokenizer().path]
    command += ["--out", tmp_path / "corpus", "--workers", "2", "--heldout-rate", "0.1"]
    command += ["--without", "docstrings", "--without", "dialogues"]
    command += [f"--input={sources / name}" for name in names]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL
    workers = killed.stdout.decode().split("\n")[-2].split()
    assert len(workers) == 2
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):  # none lives on
        time.sleep(0.05)
    assert list((tmp_path / "corpus" / "work").glob("read-*[0-9]"))
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    whole = prepare(tmp_path / "whole", request(sources, unit_bytes=64 * 1024**2))
    assert content(tmp_path / "corpus") == content(whole.folder)


def test_little_memory_gives_the_same_documents(prepared, sources, tmp_path):
    tight = prepare(tmp_path / "corpus", request(sources, memory_bytes=1_024))
    assert tight.fingerprint == prepared.fingerprint


# -- what is kept -----------------------------------------------------------------------------


def test_every_document_is_kept_or_listed_with_its_reason(prepared, sources):
    kept = [r["path"] for name in ("code", "language") for r in documents(prepared, name)]
    lists = sorted((prepared.folder / "removed").iterdir())
    removed = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
    assert len(kept) == len(set(kept)) and not set(kept) & {line["path"] for line in removed}
    given = [row["path"] for row in records()]
    tree = [p.relative_to(sources / "tree") for p in (sources / "tree").rglob("*") if p.is_file()]
    assert sorted(kept + [line["path"] for line in removed]) == sorted(given + list(map(str, tree)))
    for reason, of in prepared.manifest["removed"].items():
        paths = [line["path"] for line in removed if line["reason"] == reason]
        assert of["documents"] == len(paths) and set(of["examples"]) <= set(paths)


def test_one_of_each_cluster_is_kept_and_named(prepared):
    rows = records()
    counts = {why: of["documents"] for why, of in prepared.manifest["removed"].items()}
    assert counts["exact duplicate"] == 6 and counts["near-duplicate (Jaccard 0.8)"] == 6
    kept = {r["path"] for name in ("code", "language") for r in documents(prepared, name)}
    assert len(kept & {row["path"] for row in rows}) == len(rows) - 12
    assert rows[0]["path"] in kept and rows[-1]["path"] not in kept  # of equal ones the first
    assert rows[-2]["path"] in kept and rows[1]["path"] not in kept  # else the longest


def test_the_manifest_counts_what_is_there(prepared):
    tokenizer = corpus_fixture.tokenizer()
    for name in prepared.names:
        for which in corpus.SPLITS:
            entry, split = prepared.manifest["corpora"][name][which], prepared.split(name, which)
            assert entry["documents"] == len(split) and entry["tokens"] == split.lengths.sum()
            for number in range(0, len(split), 5):
                ids = tokens.encode(tokenizer, split.record(number)["text"])
                assert split.lengths[number] == len(ids)
    sources = prepared.manifest["sources"].values()
    assert sum(of["documents"] for of in sources) == sum(
        prepared.manifest["corpora"][name][which]["documents"]
        for name in ("code", "language")
        for which in corpus.SPLITS
    )
    corpus.open(prepared.folder, tokenizer, verify=True)


def test_python_is_a_part_of_code_without_a_copy(prepared):
    code = [r for r in documents(prepared, "code") if r["language"] == "python"]
    assert list(documents(prepared, "python")) == code and len(code) > 40
    sizes = [p.stat().st_size for p in (prepared.folder / "python").iterdir()]
    assert sum(sizes) < 5_000


def test_files_are_found_by_path(prepared):
    split = prepared.split("code", "train")
    path = split.record(7)["path"]
    assert 7 in split.find(path) and split.find("nowhere") == []
    part = prepared.split("python", "train")
    assert [part.record(n)["path"] for n in part.find(path)] == [path]


def test_held_out_files_are_trained_on_in_no_corpus(tmp_path):
    rows = [row | {"path": f"file{number // 3}"} for number, row in enumerate(records(60))]
    one = write_json_lines(tmp_path / "one.jsonl", rows[:30])
    two = write_json_lines(tmp_path / "two.jsonl", rows[30:])
    named = (Input(str(one), "one"), Input(str(two), "two"))
    made = prepare(tmp_path / "corpus", pipeline.Request(named, heldout_rate=0.001))
    paths = {which: set() for which in corpus.SPLITS}
    for name in ("one", "two"):
        for which, found in paths.items():
            split = made.split(name, which)
            assert len(split) > 0
            found.update(split.record(n)["path"] for n in range(len(split)))
    assert not paths["train"] & paths["heldout"]


def test_licences_evaluation_sets_and_keys_are_kept_out(tmp_path):
    rows = records(40)
    rows[3]["text"] = f"key = '{'AKIA' + 'IOSFODNN7ABCDEFG'}'\n" + rows[3]["text"]
    data = write_json_lines(tmp_path / "a.jsonl", rows)
    evaluation = write_json_lines(tmp_path / "eval.jsonl", [{"prompt": rows[5]["text"]}])
    asked = pipeline.Request(
        (Input(str(data)),),
        filters=pipeline.Filters(licences=("Apache-2.0",)),
        evaluations=(str(evaluation),),
    )
    made = prepare(tmp_path / "corpus", asked)
    counts = {why: of["documents"] for why, of in made.manifest["removed"].items()}
    assert counts["licence not on the list"] == 20
    assert counts["shares text with eval.jsonl"] == 1
    assert made.manifest["masked"] == {"AWS Access Key": 1}
    kept = [r for name in ("code", "language") for r in documents(made, name)]
    assert {r["licence"] for r in kept} == {"Apache-2.0"}
    assert not any("AKIA" in r["text"] or r["text"] == rows[5]["text"] for r in kept)


# -- inputs -----------------------------------------------------------------------------------


def read(path, fields=None, unit_bytes=2_000, **options):
    given = Input(str(path), **options)
    return [
        item
        for unit in inputs.units(given, unit_bytes=unit_bytes)
        for item in inputs.read(unit, fields or inputs.Fields(), file_bytes=10**6)
    ]


def test_every_format_gives_the_same_documents(tmp_path):
    rows = [{"source": "here", **row} for row in records(40)]
    expected = read(write_json_lines(tmp_path / "a.jsonl", rows))
    assert [d.text for d in expected] == [row["text"] for row in rows]
    assert {(d.language, d.licence, d.source) for d in expected} <= {
        (language, licence, "here") for language in ("python", "prose") for licence in LICENCES
    }
    assert read(write_json_lines(tmp_path / "b.jsonl.gz", rows)) == expected
    lines = [json.dumps(row).encode() for row in rows]
    corpus.write_shard(tmp_path / "c.array_record", lines)
    assert read(tmp_path / "c.array_record") == expected
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(b"\n".join(lines) + b"\n")
    (tmp_path / "d.jsonl.zst").write_bytes(packed)
    assert read(tmp_path / "d.jsonl.zst") == expected
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "e.parquet", row_group_size=7)
    assert len(inputs.units(Input(str(tmp_path / "e.parquet")), unit_bytes=2_000)) > 2
    assert read(tmp_path / "e.parquet") == expected
    for name in ("b.jsonl.gz", "c.array_record", "d.jsonl.zst", "e.parquet"):
        (tmp_path / name).unlink()
    assert read(tmp_path) == expected  # a directory of data


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    unit_bytes=st.integers(1, 400),
    end=st.sampled_from(["", "\n", "\n\n"]),
)
def test_units_of_lines_leave_none_out_and_read_none_twice(
    tmp_path_factory, texts, unit_bytes, end
):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + end)
    assert [d.text for d in read(path, unit_bytes=unit_bytes)] == texts


def test_fields_of_other_names_can_be_named(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"body": "x = 1\n", "file": "a.rs"}])
    fields = inputs.Fields(text=("body",), path=("file",))
    assert [(d.text, d.path, d.language) for d in read(path, fields)] == [
        ("x = 1\n", "a.rs", "rust")
    ]
    assert [left.reason for left in read(path)] == ["no text under text or content or code"]


def test_what_is_no_record_is_counted(tmp_path):
    lines = [b"{half", b"[1]", b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": "good\\n"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = [getattr(item, "reason", "good") for item in read(tmp_path / "a.jsonl")]
    no_text = "no text under text or content or code"
    assert found == ["not a JSON record", "not a JSON record", no_text, "not UTF-8", "good"]


def test_a_damaged_file_stops_the_run_by_name(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl.gz", records(50))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="a.jsonl.gz is damaged"):
        read(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "nowhere is neither a file"), ("a.bin", "a.bin has an unknown format")],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, message):
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_corpus_is_named_in_front_of_a_path():
    assert Input.parse("code=a/b.jsonl") == Input("a/b.jsonl", "code")
    assert Input.parse("a/b=c.jsonl") == Input("a/b=c.jsonl")
    assert Input.parse("tree") == Input("tree")


# -- what is refused --------------------------------------------------------------------------


def test_other_settings_or_files_are_refused_before_and_after_the_end(sources, tmp_path):
    copy = Path(shutil.copytree(sources, tmp_path / "sources"))

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "corpus", request(copy), progress=stop)
    with pytest.raises(ValueError, match="other settings"):
        prepare(tmp_path / "corpus", request(copy, seed=1))
    made = prepare(tmp_path / "corpus", request(copy))
    assert prepare(tmp_path / "corpus", request(copy)).manifest == made.manifest
    (copy / "tree" / "new.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="have changed since"):
        prepare(tmp_path / "corpus", request(copy))


def test_a_folder_of_something_else_and_nothing_to_keep_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    data = write_json_lines(tmp_path / "a.jsonl", [{"text": "\n"}])
    with pytest.raises(ValueError, match="mine holds something else"):
        prepare(tmp_path / "mine", pipeline.Request((Input(str(data)),)))
    fill = Input(str(write_json_lines(tmp_path / "fill.jsonl", records(20))))
    for others in ((), (fill,)):
        with pytest.raises(ValueError, match="nothing that can be used was read .1 empty.$"):
            prepare(tmp_path / str(len(others)), pipeline.Request((Input(str(data)),), fill=others))


@pytest.mark.parametrize(
    "changes", [{"inputs": ()}, {"heldout_rate": 0}, {"jaccard": 2}, {"ngram_words": 3}]
)
def test_impossible_requests_are_refused(changes):
    options = {"inputs": (Input("a"),)} | changes
    with pytest.raises(ValueError):
        pipeline.Request(**options)


@pytest.mark.filterwarnings("ignore")  # of that library's own imports
@pytest.mark.parametrize("named", [True, False])
def test_a_tensorflow_data_set_is_read_by_name_or_folder_without_tensorflow(
    tmp_path, monkeypatch, named
):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    import tiny_code

    if named:  # made where it is not yet
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
        given = tiny_code.TinyCode.name
    else:
        builder = tiny_code.TinyCode(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        given = str(builder.data_dir)
    found = read(given, unit_bytes=200)
    assert sorted(d.text for d in found) == sorted(f"x = {i}\n" for i in range(25))
    assert {d.language for d in found} == {"python"}
    assert len(inputs.units(Input(given), unit_bytes=200)) > 1
    assert list(tmp_path.rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules
