"""Imported weights are those that were imported, wherever they are read to."""

import jax
import numpy as np
import pytest
from convert_fixture import DTYPES, GQA, assert_same_bits, random_params, write

import codellama_jax
from codellama_jax import checkpoint, sharding
from codellama_jax.convert import orbax, proof, run, table
from codellama_jax.convert import weights as weights_


def mesh():
    return jax.make_mesh(
        (1, 4, 2, 1), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
    )


def flip_a_bit(folder):
    chunk = folder / "0/params/layers.feed_forward.w2/1.0.0"
    content = bytearray(chunk.read_bytes())
    content[501] ^= 4
    chunk.write_bytes(content)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_bit_is_noticed_over_a_mesh_where_a_stage_starts_and_in_use(tmp_path, dtype):
    folder = write(tmp_path / "a", "orbax", GQA, dtype)
    readers = {
        "start of a stage": lambda: checkpoint.restore_params(folder, GQA, mesh()),
        "one device": lambda: checkpoint.restore_params(folder, GQA),
        "use over a mesh": lambda: codellama_jax.load(folder, mesh=mesh()),
    }
    started = readers["start of a stage"]()
    assert started["norm"].dtype == np.float32
    assert_same_bits(
        jax.tree.map(lambda x: x.astype("float32"), random_params(GQA, dtype)),
        jax.tree.map(np.asarray, started),
    )
    flip_a_bit(folder)
    for read in readers.values():
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight is not the tens"):
            read()


def test_reading_into_a_dtype_that_rounds_is_checked_before_it_is_rounded(tmp_path):
    folder = write(tmp_path / "a", "orbax", GQA, "float32")
    rounded = checkpoint.restore_params(folder, GQA, mesh(), "bfloat16")
    assert len(rounded["layers"]["attention"]["wq"].sharding.device_set) == 8
    expected = jax.tree.map(lambda x: x.astype("bfloat16"), random_params(GQA, "float32"))
    assert_same_bits(expected, jax.tree.map(np.asarray, rounded))
    flip_a_bit(folder)
    for place in (mesh(), None):
        with pytest.raises(ValueError, match="is not the tensor"):
            checkpoint.restore_params(folder, GQA, place, "bfloat16")


def test_a_recipe_that_contradicts_the_table_is_refused_where_a_stage_starts_and_in_use(tmp_path):
    folder = write(tmp_path / "a", "orbax", GQA)
    recipe = folder / "0/recipe/metadata"
    assert "1000000.0" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("1000000.0", "10000.0"))
    with pytest.raises(ValueError, match="names another model than checksums.json"):
        checkpoint.restore_params(folder, GQA, mesh())
    for place in (None, mesh()):
        with pytest.raises(ValueError, match="another model"):
            codellama_jax.load(folder, mesh=place)


def test_a_tensor_is_hashed_once_in_a_conversion(tmp_path, monkeypatch):
    """Whether a checksum table lies beside the source or not."""
    write(tmp_path / "a", "hf", GQA)
    hashed = []
    examine = proof.examine
    monkeypatch.setattr(proof, "examine", lambda array: hashed.append(1) or examine(array))
    for source in ("with table", "without"):
        hashed.clear()
        run.convert(("hf", tmp_path / "a"), ("meta", tmp_path / source), say=lambda line: None)
        assert len(hashed) == len(list(table.tensors(GQA)))
        (tmp_path / "a/checksums.json").unlink(missing_ok=True)


def test_no_more_is_read_ahead_than_the_largest_tensor(tmp_path):
    """Or one tensor, if that is more. Reading is done by threads; what is used comes in order."""
    weights = orbax.read(write(tmp_path / "a", "orbax", GQA), run.guard.Findings())
    most = max(map(weights.size, weights.order()))
    used, read = [], []

    def counted(tensor):
        read.append(tensor)
        return weights.read(tensor)

    source = weights_.replace(weights, read=counted)
    for tensor, array in weights_.stream(source, "meta_axes"):
        assert array.shape == table.shape(tensor.row.meta_axes, table.sizes(GQA))
        used.append(tensor)
        ahead = [weights.size(t) for t in list(read) if t not in used]
        assert sum(ahead) <= most + max(ahead, default=0)
    assert used == weights.order() and set(read) == set(used)
