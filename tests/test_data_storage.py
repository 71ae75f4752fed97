"""data/storage.py: corpora in a bucket, behind a server that fails now and then."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import corpus_fixture
import pytest

from codellama_jax.data import mix, pipeline, storage
from codellama_jax.data.inputs import Input

HERE = Path(__file__).parent
NAMES = ("tree", "more.jsonl.gz", "some.array_record", "lines.jsonl")
REMOTE = """
import sys
sys.path.insert(0, sys.argv[1])
import test_data_storage
sys.exit(test_data_storage.in_the_bucket())
"""


def request(folder: str) -> pipeline.Request:
    named = tuple(Input(f"{folder}/{name}") for name in NAMES)
    return pipeline.Request(named, heldout_rate=0.1, jaccard=0)


def in_the_bucket() -> None:
    """What the other process does: prepares from gs:// to gs://, and reads."""
    from codellama_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer("gs://bucket/tokenizer.model")
    made = pipeline.prepare("gs://bucket/corpus", tokenizer, request("gs://bucket"))
    again = pipeline.prepare("gs://bucket/corpus", tokenizer, request("gs://bucket"))
    assert again.manifest == made.manifest
    print(digest("gs://bucket/corpus", tokenizer))


def digest(folder: str, tokenizer) -> str:
    """Of some batches of a corpus."""
    found = hashlib.sha256()
    reader = mix.batches(
        corpus_fixture.data(seq_len=128, batch_tokens=512), folder, tokenizer, steps=3
    )
    for batch in reader:
        for name in sorted(batch):
            found.update(name.encode() + batch[name].tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def bucket(folder: Path):
    """Serves a folder as gs://bucket; yields the variables that lead there, and what it counted."""
    counted: dict = {}
    command = [sys.executable, HERE / "fake_gcs.py", folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        address = server.stdout.readline().strip()
        places = {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # array_record
            "GOOGLE_CLOUD_PROJECT": "none",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        try:
            yield places, counted
        finally:
            server.stdin.close()
            counted |= json.loads(server.stdout.read())


@pytest.mark.slow
def test_a_corpus_in_a_bucket_has_the_same_bytes_and_gives_the_same_batches(tmp_path):
    pytest.importorskip("gcsfs")
    from test_data_pipeline import records, write_json_lines

    from codellama_jax.data import corpus

    remote = tmp_path / "bucket"
    shutil.copytree(corpus_fixture.tree() / "package1", remote / "tree")
    rows = records(120)
    write_json_lines(remote / "more.jsonl.gz", rows[:40])
    write_json_lines(remote / "lines.jsonl", rows[40:80])
    lines = [json.dumps(row).encode() for row in rows[80:]]
    corpus.write_shard(remote / "some.array_record", lines)
    shutil.copy(corpus_fixture.tokenizer().path, remote / "tokenizer.model")
    tokenizer = corpus_fixture.tokenizer()
    here = pipeline.prepare(tmp_path / "here", tokenizer, request(str(remote)))
    with bucket(remote) as (places, counted):
        done = subprocess.run(
            [sys.executable, "-c", REMOTE, HERE], env=os.environ | places, stdout=subprocess.PIPE
        )
    assert done.returncode == 0
    assert counted["failed"] > 5
    assert done.stdout.decode().split()[-1] == digest(str(here.folder), tokenizer)
    for path in filter(Path.is_file, here.folder.rglob("*")):
        name = path.relative_to(here.folder)
        if name.name != "manifest.json":  # it has the paths of the inputs
            assert (remote / "corpus" / name).read_bytes() == path.read_bytes()
    found = {
        p.relative_to(remote / "corpus") for p in (remote / "corpus").rglob("*") if p.is_file()
    }
    assert found == {p.relative_to(here.folder) for p in here.folder.rglob("*") if p.is_file()}


def test_a_place_is_relative_to_a_folder_unless_it_is_absolute_or_remote(tmp_path):
    assert storage.beside(tmp_path, "corpus") == tmp_path / "corpus"
    assert storage.beside(tmp_path, "/data/corpus") == Path("/data/corpus")
    assert str(storage.beside(tmp_path, "gs://bucket/corpus")) == "gs://bucket/corpus"


def test_what_fails_is_tried_again_unless_it_would_fail_again(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)
    calls = []

    def fails_twice():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError
        return "done"

    assert storage.again(fails_twice) == "done" and len(calls) == 3

    def missing():
        calls.append(1)
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        storage.again(missing)
    assert len(calls) == 4
