"""data/gather.py and data/corpus.py: from files to a prepared folder, whole or absent."""

import json
import shutil

import corpus_fixture
import pytest

from codellama_jax.data import corpus, gather, sources, tokens


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
    gathered, prepared = corpus_fixture.gathered(), corpus_fixture.prepared()
    seen = set(gather.training_texts(gathered, ["code"]))
    assert seen == set(prepared.texts(["code"]))
    assert not seen & set(prepared.texts(["code"], "heldout"))


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
    again = corpus.prepare(tmp_path / "again", tokenizer, request)
    assert again.manifest == prepared.manifest and again.fingerprint == prepared.fingerprint
    before = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")}
    corpus.prepare(tmp_path / "again", tokenizer, request)
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == before


def test_a_killed_preparation_is_no_corpus_and_is_done_again(copy):
    (copy / "manifest.json").unlink()
    (copy / "code" / "train-00000-of-00001.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a prepared corpus"):
        corpus.open(copy)
    tokenizer, request = corpus_fixture.tokenizer(), corpus_fixture.request()
    done = corpus.prepare(copy, tokenizer, request, gathered=corpus_fixture.gathered())
    assert done.manifest == corpus_fixture.prepared().manifest
    assert not list(copy.rglob("*.tmp*"))


def test_other_settings_or_changed_files_are_refused(copy, tmp_path):
    tokenizer = corpus_fixture.tokenizer()
    tree = corpus_fixture.write_tree(tmp_path / "tree", num_files=3)
    request = gather.Request(code_dirs=(str(tree),))
    with pytest.raises(ValueError, match="prepared with other settings"):
        corpus.prepare(copy, tokenizer, request)


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


def test_a_tree_without_python_gets_it_from_this_installation(tmp_path, monkeypatch):
    installed = sources.python_installation(limits=sources.Limits(), tally=sources.Tally())
    some = [d for d in installed if d.path.startswith(("json/", "topics/s"))]
    monkeypatch.setattr(sources, "python_installation", lambda **_: some)
    for number in range(3):
        (tmp_path / f"{number}.c").write_text(f"int f{number}(int a) {{ return a + {number}; }}\n")
    gathered = gather.gather(gather.Request(code_dirs=(str(tmp_path),)))
    assert gathered.origin["code"] == gathered.origin["code_files"] == str(tmp_path)
    assert {d.language for d in gathered.corpora["code_files"]} == {"c"}
    assert gathered.origin["python"] == "this Python installation"
    assert {d.path.split("/")[0] for d in gathered.corpora["python"]} == {"json"}


def test_long_texts_are_kept_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 4_000)
    tokenizer, request = corpus_fixture.tokenizer(), corpus_fixture.request()
    gathered = corpus_fixture.gathered()
    sharded = corpus.prepare(tmp_path, tokenizer, request, gathered=gathered)
    whole = corpus_fixture.prepared().split("code", "train")
    split = sharded.split("code", "train")
    assert len(sharded.manifest["corpora"]["code"]["train"]["records"]) > 5
    assert [split.record(i) for i in range(len(split))] == [
        whole.record(i) for i in range(len(whole))
    ]


@pytest.mark.parametrize(
    "changes", [{"heldout_rate": 0.0}, {"jaccard": 1.5}, {"function_chars": 10}]
)
def test_impossible_requests_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        gather.Request(**changes)
