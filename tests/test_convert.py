"""Weights through every format and back: the same bits, or nothing at the destination."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from convert_fixture import DTYPES, GQA, MHA, assert_same_bits, leaves, random_params, write

import codellama_jax
from codellama_jax import checkpoint, convert, sharding
from codellama_jax.convert import orbax, proof, pth, table
from codellama_jax.convert import weights as weights_


def quiet(line):
    pass


# -- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MHA, GQA], ids=["mha-336", "gqa-320"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_orbax_hf_orbax_meta_is_the_identity_on_every_bit(tmp_path, model, shards, dtype):
    places = [write(tmp_path / "0", "meta", model, dtype, shards=shards)]
    kinds = ["meta", "orbax", "hf", "orbax", "meta"]
    for i, (kind, to) in enumerate(zip(kinds, kinds[1:], strict=False), 1):
        options = {"meta": {"shards": shards}, "hf": {"shard_bytes": 50_000}}.get(to, {})
        places.append(tmp_path / str(i))
        convert.convert((kind, places[-2]), (to, places[-1]), say=quiet, **options)
    for file in places[0].iterdir():
        assert file.read_bytes() == (places[-1] / file.name).read_bytes(), file.name
    assert_same_bits(random_params(model, dtype), convert.read_params(places[-1], say=quiet)[1])


def test_other_shards_are_the_same_weights(tmp_path):
    write(tmp_path / "1", "meta", GQA)
    convert.convert(("meta", tmp_path / "1"), ("meta", tmp_path / "8"), shards=8, say=quiet)
    convert.convert(("meta", tmp_path / "8"), ("meta", tmp_path / "1b"), say=quiet)
    one, again = (tmp_path / name / "consolidated.00.pth" for name in ("1", "1b"))
    assert one.read_bytes() == again.read_bytes()
    assert len(list((tmp_path / "8").glob("*.pth"))) == 8


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_tied_embeddings_stay_tied(tmp_path, kind):
    tied = replace(GQA, tied_embeddings=True)
    write(tmp_path / "a", "hf", tied)
    convert.convert(("hf", tmp_path / "a"), (kind, tmp_path / "b"), say=quiet)
    model, params = convert.read_params(tmp_path / "b", say=quiet)
    assert model == tied and "output" not in params


@pytest.mark.parametrize("shards", [1, 8])
def test_tied_embeddings_are_written_twice_where_meta_has_no_word_for_them(tmp_path, shards):
    write(tmp_path / "a", "hf", replace(GQA, tied_embeddings=True))
    lines, to = [], ("meta", tmp_path / "b")
    convert.convert(("hf", tmp_path / "a"), to, shards=shards, verify=True, say=lines.append)
    assert any(line.startswith("repaired: Meta's format has no tied") for line in lines)
    model, params = convert.read_params(tmp_path / "b", say=quiet)
    tied = convert.read_params(tmp_path / "a", say=quiet)[1]
    assert model == GQA
    assert params.pop("output").tobytes() == tied["tok_embeddings"].T.tobytes()
    assert_same_bits(params, tied)


def test_metas_and_hugging_faces_files_of_one_model_give_the_same_bits(material):
    meta_model, meta_params = convert.read_params(material / "meta_gqa_v512/mp2", say=quiet)
    hf_model, hf_params = convert.read_params(material / "hf_gqa_v512", say=quiet)
    assert meta_model == hf_model
    assert_same_bits(meta_params, hf_params)


def test_metas_and_hugging_faces_files_of_every_oracle_give_the_same_bits(outside_material):
    oracles = outside_material / "oracles"
    for name in ("gqa_v512", "stories260K"):
        hf = leaves(convert.read_params(oracles / f"hf_{name}", say=quiet)[1])
        for mp in ("mp1", "mp2"):
            meta = leaves(convert.read_params(oracles / f"meta_{name}/{mp}", say=quiet)[1])
            for path, array in hf.items():
                assert meta[path].tobytes() == array.tobytes(), (name, mp, path)


# -- dtypes ------------------------------------------------------------------------------------


def test_a_wider_dtype_is_exact_and_back_is_the_identity(tmp_path):
    write(tmp_path / "a", "hf", GQA, "bfloat16")
    convert.convert(("hf", tmp_path / "a"), ("hf", tmp_path / "b"), dtype="float32", say=quiet)
    convert.convert(("hf", tmp_path / "b"), ("hf", tmp_path / "c"), dtype="bfloat16", say=quiet)
    a, c = (tmp_path / name / "model.safetensors" for name in "ac")
    assert a.read_bytes() == c.read_bytes()


def test_a_narrower_dtype_is_rounded_to_nearest_and_said(tmp_path):
    write(tmp_path / "a", "meta", GQA, "float32")
    lines = []
    convert.convert(
        ("meta", tmp_path / "a"), ("orbax", tmp_path / "b"), dtype="bfloat16", say=lines.append
    )
    assert any("rounded to nearest" in line for line in lines)
    rounded = leaves(convert.read_params(tmp_path / "b", say=quiet)[1])
    for path, array in leaves(random_params(GQA, "float32")).items():
        np.testing.assert_array_equal(rounded[path], array.astype(rounded[path].dtype))


def test_float16_too_small_for_a_weight_is_refused(tmp_path):
    params = random_params(GQA, "float32")
    params["output"][3, 5] = 1e5
    convert.export_hf(params, GQA, tmp_path / "a")
    with pytest.raises(ValueError, match="lm_head.weight has NaN or infinite"):
        convert.convert(("hf", tmp_path / "a"), ("hf", tmp_path / "b"), dtype="float16", say=quiet)
    assert not (tmp_path / "b").exists()


# -- Orbax -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_restores_our_files_onto_eight_devices(tmp_path, dtype):
    write(tmp_path / "stage", "orbax", GQA, dtype)
    mesh = jax.make_mesh(
        (1, 4, 2, 1), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
    )
    params = checkpoint.restore_params(tmp_path / "stage", GQA, mesh, dtype)
    assert len(params["layers"]["attention"]["wq"].sharding.device_set) == 8
    assert_same_bits(random_params(GQA, dtype), jax.tree.map(np.asarray, params))


def test_orbaxs_manager_takes_our_folder_for_a_finished_step(tmp_path):
    write(tmp_path / "stage", "orbax", GQA)
    with ocp.CheckpointManager(tmp_path / "stage", item_names=("params", "recipe")) as manager:
        assert manager.all_steps() == [0]
        restored = manager.restore(0, args=ocp.args.Composite(recipe=ocp.args.JsonRestore()))
    assert restored.recipe["model"]["num_kv_heads"] == GQA.num_kv_heads


@pytest.mark.parametrize(("smallest", "layers"), [(1, 1), (1_000_000, 4)])
def test_a_trained_checkpoint_is_exported_as_it_is(tmp_path, monkeypatch, smallest, layers):
    """Written by Orbax itself, from arrays on eight devices, in chunks of one layer or all."""
    model = replace(GQA, num_layers=4)
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = random_params(model, "float32")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = jax.tree.map(
        lambda x: jax.device_put(x, place) if x.ndim > 2 else jax.numpy.array(x), params
    )
    recipe = {"model": model.__dict__, "stage": None, "tokenizer_fingerprint": None}
    monkeypatch.setattr(checkpoint, "SMALLEST_CHUNK", smallest)
    with ocp.CheckpointManager(tmp_path / "stage", item_names=("params", "recipe")) as manager:
        for step in (7, 12):
            args = ocp.args.Composite(
                params=ocp.args.PyTreeSave(placed, save_args=checkpoint._by_layer(placed)),
                recipe=ocp.args.JsonSave(recipe),
            )
            manager.save(step, args=args)
    wk = next(row for row in table.TABLE if row.ours == "layers.attention.wk")
    stored = orbax._open(tmp_path / "stage/12/params", wk, model)
    assert stored.chunk_layout.read_chunk.shape[0] == layers
    convert.convert(("orbax", tmp_path / "stage"), ("hf", tmp_path / "hf"), verify=True, say=quiet)
    assert_same_bits(params, convert.read_params(tmp_path / "hf", say=quiet)[1])


def test_parameters_in_memory_are_exported_whether_numpy_or_jax(tmp_path):
    params = random_params(GQA, "float32")
    convert.export_hf(params, GQA, tmp_path / "numpy")
    convert.export_hf(jax.tree.map(jax.numpy.asarray, params), GQA, tmp_path / "jax")
    numpy, jax_ = (tmp_path / name / "model.safetensors" for name in ("numpy", "jax"))
    assert numpy.read_bytes() == jax_.read_bytes()


# -- proof -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["meta", "hf", "orbax"])
def test_the_checksum_table_is_the_same_in_every_format(tmp_path, kind):
    write(tmp_path / "hf", "hf", GQA)
    write(tmp_path / "other", kind, GQA)
    tables = [(tmp_path / name / "checksums.json").read_bytes() for name in ("hf", "other")]
    assert tables[0] == tables[1]


def test_the_checksum_table_does_not_depend_on_the_order_of_reading(tmp_path):
    folder = write(tmp_path / "a", "hf", GQA)
    before, known = (folder / "checksums.json").read_bytes(), proof.read(folder)
    replace(known, tensors=dict(reversed(known.tensors.items()))).write(folder)
    assert (folder / "checksums.json").read_bytes() == before


def test_checking_needs_a_table(tmp_path):
    folder = write(tmp_path / "a", "hf", GQA)
    convert.check(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match="no checksums.json beside"):
        convert.check(folder)


@pytest.mark.parametrize("kind", ["meta", "hf", "orbax"])
def test_a_flipped_bit_is_noticed_on_load(tmp_path, kind):
    folder = write(tmp_path / "a", kind, GQA)
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for read in (convert.check, convert.read_params, codellama_jax.load):
        with pytest.raises(ValueError, match="is not the tensor that checksums.json"):
            read(folder)
    convert.read_params(folder, allow=("checksums",), say=quiet)


def test_verify_notices_what_was_written_wrong(tmp_path, monkeypatch):
    write(tmp_path / "a", "meta", GQA)
    add = pth.Writer.add
    monkeypatch.setattr(pth.Writer, "add", lambda self, array: add(self, array[::-1]))
    with pytest.raises(ValueError):
        convert.convert(("meta", tmp_path / "a"), ("meta", tmp_path / "b"), verify=True, say=quiet)
    assert os.listdir(tmp_path) == ["a"]


def test_verify_checks_metas_own_checklist(tmp_path):
    folder = write(tmp_path / "a", "meta", GQA)
    checklist = (folder / "checklist.chk").read_text()
    (folder / "checklist.chk").write_text(checklist.replace(checklist[:4], "0000"))
    jobs = {"source": ("meta", folder), "say": quiet, "verify": True}
    with pytest.raises(ValueError, match="consolidated.00.pth has not the MD5"):
        convert.convert(destination=("hf", tmp_path / "b"), **jobs)
    convert.convert(destination=("hf", tmp_path / "b"), allow=("checklist",), **jobs)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_checkpoint_with_a_lost_or_truncated_chunk_is_refused(tmp_path, damage):
    """Even without our checksums. A chunk that is not there must not read as zeros."""
    folder = write(tmp_path / "a", "orbax", GQA)
    (folder / "checksums.json").unlink()
    chunk = folder / "0/params/layers.feed_forward.w1/1.0.0"
    content = chunk.read_bytes()
    chunk.unlink() if damage == "missing" else chunk.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"layers\.feed_forward\.w1"):
        convert.read_params(folder)


def test_the_command_line_says_what_is_wrong_in_a_sentence(tmp_path):
    tool = Path(__file__).parents[1] / "tools" / "convert_weights.py"
    write(tmp_path / "a", "hf", GQA)
    (tmp_path / "a/config.json").write_text("not found")
    command = [sys.executable, tool, "--from", "hf", tmp_path / "a", "--to", "meta", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.strip() == ""
    assert done.stderr.startswith("error: ") and "is no JSON object; it begins" in done.stderr
    assert os.listdir(tmp_path) == ["a"]


# -- whole or absent ---------------------------------------------------------------------------


def test_after_a_refusal_in_the_middle_nothing_is_at_the_destination(tmp_path):
    params = random_params(GQA, "bfloat16")
    params["layers"]["ffn_norm"][1, 3] = np.nan
    source = weights_.from_params(params, GQA)
    from codellama_jax.convert import run

    (tmp_path / "a").mkdir()
    run._write(source, "hf", tmp_path / "a", {})
    for to in ("hf", "meta", "orbax"):
        with pytest.raises(ValueError, match=r"layers\.1\.post_attention_layernorm.*NaN"):
            convert.convert(("hf", tmp_path / "a"), (to, tmp_path / "b"), say=quiet)
        assert os.listdir(tmp_path) == ["a"]
    allow = ("nonfinite",)
    convert.convert(("hf", tmp_path / "a"), ("hf", tmp_path / "b"), allow=allow, say=quiet)


KILLED_HALFWAY = """
import os, signal, sys
from codellama_jax import convert
def progress(done, whole):
    if 2 * done > whole:
        os.kill(os.getpid(), signal.SIGKILL)
convert.convert(("hf", sys.argv[1]), ("orbax", sys.argv[2]), progress=progress, say=lambda _: None)
"""


def test_after_a_kill_nothing_is_at_the_destination_and_the_next_run_succeeds(tmp_path):
    write(tmp_path / "a", "hf", GQA)
    killed = subprocess.run([sys.executable, "-c", KILLED_HALFWAY, tmp_path / "a", tmp_path / "b"])
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["a", "b.partial"]
    convert.convert(("hf", tmp_path / "a"), ("orbax", tmp_path / "b"), say=quiet)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert_same_bits(
        random_params(GQA, "bfloat16"), convert.read_params(tmp_path / "b", say=quiet)[1]
    )


def test_a_destination_that_exists_is_left_alone(tmp_path):
    write(tmp_path / "a", "hf", GQA)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists already"):
        convert.convert(("hf", tmp_path / "a"), ("meta", tmp_path / "b"), say=quiet)
    assert os.listdir(tmp_path / "b") == ["thesis.tex"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path / "a", "hf", GQA)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1_000))
    with pytest.raises(ValueError, match="1,000 bytes left"):
        convert.convert(("hf", tmp_path / "a"), ("hf", tmp_path / "b"), say=quiet)
    assert os.listdir(tmp_path) == ["a"]


# -- options -----------------------------------------------------------------------------------


def test_an_option_without_effect_is_refused(tmp_path):
    write(tmp_path / "a", "hf", GQA)
    source, to = ("hf", tmp_path / "a"), ("orbax", tmp_path / "b")
    with pytest.raises(ValueError, match="shards=2 has no effect"):
        convert.convert(source, to, shards=2, say=quiet)
    with pytest.raises(ValueError, match="shard_bytes=7 has no effect"):
        convert.convert(source, to, shard_bytes=7, say=quiet)
    with pytest.raises(ValueError, match="'pth' is not a format; there are meta, hf, orbax"):
        convert.convert(source, ("pth", tmp_path / "b"), say=quiet)
    with pytest.raises(ValueError, match="--allow nonfinite had no effect"):
        convert.convert(source, to, allow=("nonfinite",), say=quiet)
    with pytest.raises(ValueError, match="cannot allow NaNs; there are"):
        convert.convert(source, to, allow=("NaNs",), say=quiet)
    assert os.listdir(tmp_path) == ["a"]


def test_shards_that_do_not_divide_the_heads_are_refused(tmp_path):
    write(tmp_path / "a", "hf", replace(GQA, num_kv_heads=2))
    with pytest.raises(ValueError, match="num_kv_heads=2 does not divide by shards=4"):
        convert.convert(("hf", tmp_path / "a"), ("meta", tmp_path / "b"), shards=4, say=quiet)


def test_files_are_cut_at_the_size_that_is_asked_for(tmp_path):
    write(tmp_path / "a", "hf", GQA, shard_bytes=60_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert all(file.stat().st_size < 63_000 for file in files) and len(files) > 3
    assert index["metadata"]["total_size"] == 2 * GQA.num_params
    assert len(index["weight_map"]) == len(list(table.tensors(GQA)))


def test_bin_files_are_read_like_safetensors(tmp_path):
    write(tmp_path / "a", "hf", GQA)
    (tmp_path / "b").mkdir()
    source = weights_.from_params(random_params(GQA, "bfloat16"), GQA)
    tensors = list(table.tensors(GQA))
    halves, places = [tensors[:9], tensors[9:]], {}
    for i, half in enumerate(halves):
        name = f"pytorch_model-{i}.bin"
        plan = [(t.hf, source.shape(t)) for t in half]
        with pth.Writer(tmp_path / "b" / name, plan, source.dtype) as file:
            for tensor in half:
                file.add(source.read(tensor))
                places[tensor.hf] = name
    (tmp_path / "b/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.copy(tmp_path / "a/config.json", tmp_path / "b")
    assert_same_bits(
        convert.read_params(tmp_path / "a", say=quiet)[1],
        convert.read_params(tmp_path / "b", say=quiet)[1],
    )


def test_progress_ends_at_the_whole_and_counts_what_verify_reads(tmp_path):
    write(tmp_path / "a", "hf", GQA)
    for verify, passes in ((False, 1), (True, 3)):
        seen = []
        convert.convert(
            ("hf", tmp_path / "a"),
            ("meta", tmp_path / f"b{passes}"),
            verify=verify,
            progress=lambda done, whole, seen=seen: seen.append((done, whole)),
            say=quiet,
        )
        assert seen == sorted(seen) and len(seen) == passes * len(list(table.tensors(GQA)))
        assert seen[-1] == (2 * GQA.num_params * passes,) * 2


# -- memory ------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
from codellama_jax import convert, malloc
malloc.keep_freed(malloc.MOST)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
formats = ["hf", "orbax", "meta", "hf"]
for i, (kind, to) in enumerate(zip(formats, formats[1:])):
    source, destination = (Path(sys.argv[1]) / str(n) for n in (i, i + 1))
    convert.convert((kind, source), (to, destination), say=lambda line: None)
print((peak() - before) >> 10)
"""


def test_memory_holds_a_few_tensors_whatever_the_models_size(tmp_path):
    """A model of 129 MB, whose largest tensor has 1: converting takes far less than it."""
    model = replace(GQA, dim=512, ffn_dim=1_024, num_layers=24, num_kv_heads=16)
    write(tmp_path / "0", "hf", model)
    command = [sys.executable, "-c", PEAK, tmp_path]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert int(done.stdout) < 40, f"{done.stdout} MiB"
