"""Folders broken in one place each: a sentence that says where, and nothing at the destination."""

import json
import pickle
import shutil
import struct
import zipfile

import pytest
from convert_fixture import GQA, write

from codellama_jax.convert import run

Q = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS, SHARD = "model.safetensors", "consolidated.01.pth"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of each format, without our checksum table, as others' are."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, options in {"hf": {}, "meta": {"shards": 4}, "orbax": {}}.items():
        write(folder / kind, kind, GQA, **options)
    return folder


# -- ways to break a file ----------------------------------------------------------------------


def content(name, data):
    """The file holds something else."""
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name, **values):
    """A JSON object has other values."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def header(**values):
    """The safetensors header says other things of one tensor."""

    def change(folder):
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        said = json.loads(data[8 : 8 + length])
        said[Q] |= values
        text = json.dumps(said).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def bare(text):
    return content(WEIGHTS, struct.pack("<Q", len(text)) + text)


def archive(names, data, compression=zipfile.ZIP_STORED):
    """Members of a .pth file, by the end of their names, hold something else, or are compressed."""

    def change(folder):
        with zipfile.ZipFile(folder / SHARD) as file:
            members = {info.filename: file.read(info) for info in file.infolist()}
        with zipfile.ZipFile(folder / SHARD, "w", compression) as file:
            for name, was in members.items():
                file.writestr(name, data if data is not None and name.endswith(names) else was)

    return change


def renamed(path, to):
    return lambda folder: (folder / path).rename(folder / to)


def copied(path, to):
    return lambda folder: shutil.copy(folder / path, folder / to)


def removed(*paths):
    return lambda folder: [(folder / path).unlink() for path in paths]


NORM, RECIPE = "0/params/norm", "0/recipe/metadata"
DEEP = b"[" * 100_000
# fmt: off
BROKEN = [  # format, what is broken, what the refusal says
    ("hf", cut(WEIGHTS, 4),                       "is not a whole safetensors file"),
    ("hf", cut(WEIGHTS, 100),                     "is not a whole safetensors file"),
    ("hf", cut(WEIGHTS, -1),                      "is it truncated"),
    ("hf", bare(b"[1, 2]"),                       "is not a safetensors file: no JSON header"),
    ("hf", bare(DEEP),                            "is not a safetensors file: no JSON header"),
    ("hf", bare(b'{"\xff": 1}'),                  "is not a safetensors file: no JSON header"),
    ("hf", header(data_offsets=["a", "b"]),       f"entry for {Q} is not a tensor's"),
    ("hf", header(data_offsets=[0.0, 8192.0]),    f"entry for {Q} is not a tensor's"),
    ("hf", header(data_offsets=[-8192, 0]),       "overlaps another tensor or leaves a gap"),
    ("hf", header(shape="64"),                    f"entry for {Q} is not a tensor's"),
    ("hf", header(shape=[1 << 62, 1 << 62]),      "does not fill"),
    ("hf", header(dtype=["BF16"]),                f"entry for {Q} is not a tensor's"),
    ("hf", header(dtype="F8_E4M3"),               "is F8_E4M3; only BF16, F16, F32"),
    ("hf", header(dtype="F16"),                   "several dtypes"),
    ("hf", header(shape=[8, 8, 64]),              f"tensors are missing: {Q}"),
    ("hf", content("config.json", DEEP),          "config.json is no JSON object"),
    ("hf", content("config.json", b"{}"),         "the number of heads, missing"),
    ("hf", put("config.json", rope_parameters=[1]), "rope_parameters is [1], which is no JSON"),
    ("hf", put("config.json", tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    ("hf", content("tokenizer.json", b"\xff\xfe"), "is not a whole tokenizer.json"),
    ("hf", content("tokenizer.json", b'{"model": {"vocab": {}}}'), "not a whole tokenizer.json"),
    ("hf", content("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'), "whole tokenizer.json"),
    ("hf", content("tokenizer.model", b"hello"),  "is not a whole SentencePiece model"),
    ("meta", cut(SHARD, -1),                      "is not a whole PyTorch file"),
    ("meta", cut(SHARD, 0),                       "is not a whole PyTorch file"),
    ("meta", removed(SHARD),                      "consolidated.01.pth missing"),
    ("meta", removed("consolidated.02.pth", "consolidated.03.pth"), "is a shard missing?"),
    ("meta", copied("consolidated.00.pth", SHARD), "01.pth is a copy of consolidated.00.pth"),
    ("meta", archive("data.pkl", pickle.dumps([1])), "something else than a dict of tensors"),
    ("meta", archive("data.pkl", b"\x80\x02j\xff\xff\xff\x7f."), "data.pkl is damaged"),
    ("meta", archive("data.pkl", b"\x80\x02Nr\xff\xff\xff\x7f."), "data.pkl is damaged"),
    ("meta", archive("byteorder", b"big"),        "byte order b'big'"),
    ("meta", archive("byteorder", bytes(1 << 24), zipfile.ZIP_DEFLATED), "weights of byte order"),
    ("meta", archive("none", None, zipfile.ZIP_DEFLATED), "is compressed"),
    ("meta", put("params.json", n_kv_heads=4),    "num_kv_heads is 4 in the settings, 8 in the"),
    ("orbax", content("0/params/_METADATA", b"[]"), "_METADATA is no JSON object"),
    ("orbax", content(f"{NORM}/.zarray", b"\xff"), "has no whole norm"),
    ("orbax", renamed(f"{NORM}/0", f"{NORM}/1"),  "has 0 bytes instead of 128"),
    ("orbax", content(RECIPE, b"[]"),             "metadata is no JSON object"),
    ("orbax", content(RECIPE, b'{"model": 7}'),   "does not name its model"),
]
# fmt: on


@pytest.mark.parametrize(("kind", "change", "reason"), BROKEN)
def test_a_folder_broken_in_one_place_is_refused_in_a_sentence(
    tmp_path, whole, kind, change, reason
):
    shutil.copytree(whole / kind, tmp_path / "a")
    (tmp_path / "a/checksums.json").unlink()
    change(tmp_path / "a")
    with pytest.raises(ValueError) as refusal:
        run.convert((kind, tmp_path / "a"), ("hf", tmp_path / "b"), say=lambda line: None)
    assert reason in str(refusal.value) and len(str(refusal.value)) < 1_000
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# fmt: off
@pytest.mark.parametrize(("kind", "change", "reason"), [
    ("hf",    put("checksums.json", dtype="float32"), "of float32 weights, these are bfloat16"),
    ("hf",    put("checksums.json", tensors=[1]),     "checksums.json is damaged"),
    ("orbax", put(RECIPE, model=GQA.__dict__ | {"rope_theta": 1e4}), "table is of another model"),
])
# fmt: on
def test_a_checksum_table_that_says_otherwise_is_believed(tmp_path, whole, kind, change, reason):
    shutil.copytree(whole / kind, tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(ValueError, match=reason):
        run.convert((kind, tmp_path / "a"), ("hf", tmp_path / "b"), say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_checklist_must_name_every_shard(tmp_path, whole):
    shutil.copytree(whole / "meta", tmp_path / "a")
    lines = (tmp_path / "a/checklist.chk").read_text().splitlines()
    (tmp_path / "a/checklist.chk").write_text("\n".join(lines[1:]))
    job = {"source": ("meta", tmp_path / "a"), "verify": True, "say": lambda line: None}
    with pytest.raises(ValueError, match="does not name consolidated.00.pth"):
        run.convert(destination=("hf", tmp_path / "b"), **job)


def test_a_full_destination_is_refused_before_anything_is_read(tmp_path, whole):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("years of work")
    lines = []
    with pytest.raises(ValueError, match="exists already"):
        run.convert(("meta", whole / "meta"), ("hf", tmp_path / "b"), say=lines.append)
    assert not lines
