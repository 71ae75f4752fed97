"""Tensors in pieces: blocks that are hashed and written, and slices of a layer in several files."""

import numpy as np
import pytest
from convert_fixture import GQA, assert_same_bits, random_params, write

from codellama_jax import convert
from codellama_jax.convert import blocks, orbax, table


@pytest.mark.parametrize("axes", ["rows", "columns"])
def test_blocks_are_the_bytes_in_order(axes):
    x = np.arange(3 << 19, dtype=np.float32).reshape(1 << 9, -1)
    x = x[:, 5:-7] if axes == "columns" else x
    pieces = list(blocks.of(x))
    assert len(pieces) > 2 and max(piece.nbytes for piece in pieces) <= blocks.SIZE
    assert b"".join(piece.tobytes() for piece in pieces) == x.tobytes()


@pytest.mark.parametrize("row", table.TABLE, ids=lambda row: row.ours)
def test_slices_along_the_width_are_put_together_as_they_would_be_whole(row):
    lengths = table.sizes(GQA)
    x = np.random.default_rng(0).integers(0, 9, table.shape(row.ours_axes, lengths), np.uint16)
    whole = table.rearrange(x, row.ours_axes, row.hf_axes, lengths)
    out = np.empty_like(whole)
    ours = row.ours_axes.replace("(two h)", "H").split().index("D")
    parts = np.split(x, 4, axis=ours)
    places = np.split(out, 4, axis=0 if row.hf_axes.startswith("D") else 1)
    for part, place in zip(parts, places, strict=True):
        table.rearrange(part, row.ours_axes, row.hf_axes, lengths | {"D": GQA.dim // 4}, place)
    assert out.tobytes() == whole.tobytes()


def test_a_layer_in_several_files_is_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 2_000)
    folder = write(tmp_path / "a", "orbax", GQA)
    assert len(list((folder / "0/params/layers.feed_forward.w2").glob("1.*"))) > 1
    assert_same_bits(random_params(GQA, "bfloat16"), convert.read_params(folder)[1])
    monkeypatch.undo()  # then the files are another's, which TensorStore reads
    assert_same_bits(random_params(GQA, "bfloat16"), convert.read_params(folder)[1])
