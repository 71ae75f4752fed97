"""data/corpus.py, heldout.py and the forms of data/tasks.py: from files to a prepared folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import corpus_fixture
import pytest

from codellama_jax.data import corpus, heldout, pipeline, tokens
from codellama_jax.data.inputs import Input


@pytest.fixture
def copy(tmp_path):
    """A copy of the prepared corpus, to be damaged."""
    return shutil.copytree(corpus_fixture.prepared().folder, tmp_path / "corpus")


def test_records_and_lengths_agree():
    prepared, tokenizer = corpus_fixture.prepared(), corpus_fixture.tokenizer()
    for name in prepared.names:
        for which in corpus.SPLITS:
            split = prepared.split(name, which)
            for number in range(0, len(split), 7):
                record = split.record(number)
                if "text" in record:
                    ids = tokens.encode(tokenizer, record["text"])
                    assert split.lengths[number] == len(ids)
                assert record["path"] and record["language"] and record["licence"]


def test_held_out_files_are_trained_on_in_no_corpus():
    prepared = corpus_fixture.prepared()
    paths = {"train": set(), "heldout": set()}
    for name in prepared.names:
        for which, found in paths.items():
            split = prepared.split(name, which)
            assert len(split) > 0
            found.update(split.record(number)["path"] for number in range(len(split)))
    assert not paths["train"] & paths["heldout"]
    assert 0.02 < len(paths["heldout"]) / len(paths["train"] | paths["heldout"]) < 0.25


def test_a_tokenizer_sees_no_held_out_text():
    prepared = corpus_fixture.prepared()
    seen = corpus_fixture.training_texts("code")
    assert seen == list(prepared.texts(["code"]))
    assert not set(seen) & set(prepared.texts(["code"], "heldout"))


def test_the_manifest_counts_what_is_there():
    prepared = corpus_fixture.prepared()
    for name in prepared.names:
        for which in corpus.SPLITS:
            entry, split = prepared.manifest["corpora"][name][which], prepared.split(name, which)
            assert entry["documents"] == len(split)
            assert entry["tokens"] == split.lengths.sum()
            for key in ("documents", "bytes", "tokens"):
                assert entry[key] == sum(of[key] for of in entry["languages"].values())
    assert prepared.manifest["corpora"]["code"]["train"]["languages"].keys() == {"c", "python"}


def test_preparing_again_gives_the_same_bytes_and_reuses_what_is_there(tmp_path):
    prepared, tokenizer = corpus_fixture.prepared(), corpus_fixture.tokenizer()
    request = corpus_fixture.request()
    again = pipeline.prepare(tmp_path / "again", tokenizer, request, workers=2)
    assert again.manifest == prepared.manifest and again.fingerprint == prepared.fingerprint
    before = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")}
    pipeline.prepare(tmp_path / "again", tokenizer, request)
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == before


def test_other_settings_are_refused(copy):
    with pytest.raises(ValueError, match="prepared with other settings"):
        pipeline.prepare(copy, corpus_fixture.tokenizer(), corpus_fixture.request(seed=1))


def test_another_tokenizer_is_refused(copy):
    with pytest.raises(ValueError, match="prepared for another tokenizer"):
        corpus.open(copy, corpus_fixture.other_tokenizer())


def test_damage_is_named(copy):
    shard = copy / "code" / "train-00000-of-00001.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} has {len(content) - 10} bytes, not"):
        corpus.open(copy)
    shard.write_bytes(content[:1_000] + b"\0" + content[1_001:])
    corpus.open(copy)
    with pytest.raises(ValueError, match="differs from its checksum"):
        corpus.open(copy, verify=True)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        corpus.open(copy)


def test_a_manifest_that_is_half_or_of_another_format_is_refused(copy):
    path = copy / "manifest.json"
    manifest = path.read_text()
    path.write_text(manifest[: len(manifest) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        corpus.open(copy)
    path.write_text(json.dumps(json.loads(manifest) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this code reads 1"):
        corpus.open(copy)


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="no corpus 'rust'; it has code, python, code_files"):
        corpus_fixture.prepared().split("rust", "train")


# -- forms ------------------------------------------------------------------------------------


def test_one_input_gives_all_forms():
    prepared = corpus_fixture.prepared()
    assert prepared.names == list(corpus.NAMES)
    assert prepared.manifest["corpora"]["dialogues"]["kind"] == "dialogues"
    functions, files = (prepared.split(name, "train") for name in ("code", "code_files"))
    assert len(functions) > 3 * len(files)
    assert max(len(functions.record(i)["text"]) for i in range(len(functions))) < 400


def test_whole_files_come_with_docstrings_and_dialogues_unless_not_wanted(tmp_path):
    tokenizer = corpus_fixture.tokenizer()
    request = corpus_fixture.request(function_chars=0)
    made = pipeline.prepare(tmp_path / "a", tokenizer, request)
    assert made.names == ["code", "python", "code_language", "language", "dialogues"]
    without = pipeline.prepare(tmp_path / "b", tokenizer, replace(request, forms=()))
    assert without.names == ["code", "python", "language"]
    for name in without.names:
        assert made.manifest["corpora"][name] == without.manifest["corpora"][name]


def test_dialogues_of_an_input_are_kept_and_what_is_none_is_listed(tmp_path):
    good = [
        [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"I, {n}!"}]
        for n in range(30)
    ]
    bad = [[{"role": "assistant", "content": "I begin, which is out of order"}]]
    lines = [json.dumps({"messages": dialog}) for dialog in good + bad]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    request = pipeline.Request((Input(str(tmp_path / "chat.jsonl")),), heldout_rate=0.1)
    made = pipeline.prepare(tmp_path / "corpus", corpus_fixture.tokenizer(), request)
    assert made.names == ["dialogues"]
    splits = [made.split("dialogues", which) for which in corpus.SPLITS]
    kept = [split.record(i)["dialog"] for split in splits for i in range(len(split))]
    assert sorted(map(str, kept)) == sorted(map(str, good))
    assert made.manifest["removed"].keys() == {"not a dialogue that ends with an answer"}


def test_what_the_inputs_have_nothing_for_is_filled(tmp_path):
    for number in range(30):
        path = tmp_path / "mine" / f"{number}.c"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"int f{number}(int a) {{ return a + {number * number}; }}\n")
    request = corpus_fixture.request(
        inputs=(Input(str(tmp_path / "mine")),), fill=(Input(str(corpus_fixture.tree())),)
    )
    made = pipeline.prepare(tmp_path / "corpus", corpus_fixture.tokenizer(), request)
    assert made.names == list(corpus.NAMES)
    origins = {name: Path(entry["origin"]) for name, entry in made.manifest["corpora"].items()}
    mine = {name for name, origin in origins.items() if origin == tmp_path / "mine"}
    assert mine == {"code", "code_files"}
    assert {origins[name] for name in set(made.names) - mine} == {corpus_fixture.tree()}
    assert made.manifest["corpora"]["code_files"]["train"]["languages"].keys() == {"c"}
    assert made.manifest["corpora"]["python"]["train"]["languages"].keys() == {"python"}


def test_a_held_out_file_that_was_copied_is_held_out_in_no_form(tmp_path):
    """A file of functions, most of which stand in other files too, with other things around."""
    tree = shutil.copytree(corpus_fixture.tree(), tmp_path / "tree")
    paths = sorted((tree / "package1").glob("*.py"))
    for number, path in enumerate(paths):
        functions = path.read_text().split("\n\n\n")[:4]
        around = "\n\n\n".join(f"SIZE_{number}_{i} = {i} * {number}\n" * 40 for i in range(9))
        copied = tree / "copied" / f"copy_{number}.py"
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(around + "\n\n\n" + "\n\n\n".join(functions) + "\n")
    request = corpus_fixture.request(inputs=(Input(str(tree)),), heldout_rate=0.3)
    made = pipeline.prepare(tmp_path / "corpus", corpus_fixture.tokenizer(), request)
    trained = " ".join(" ".join(text.split()) for text in made.texts(["code_files"]))
    for name in ("code", "code_language"):
        for text in made.texts([name], "heldout"):
            body = " ".join(text.split()[-20:])
            assert len(text.split()) < 20 or body not in trained
    split = made.split("dialogues", "heldout")
    for number in range(len(split)):
        answer = split.record(number)["dialog"][-1]["content"]
        assert " ".join(answer.split("\n", 1)[1].split()) not in trained
    assert made.manifest["removed_pieces"][heldout.LEAK]["documents"] > 0


@pytest.mark.parametrize(
    "changes",
    [{"heldout_rate": 0.0}, {"jaccard": 1.5}, {"function_chars": 10}, {"forms": ("poems",)}],
)
def test_impossible_requests_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        corpus_fixture.request(**changes)
