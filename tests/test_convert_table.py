import ml_dtypes
import numpy as np
import pytest
from convert_fixture import GQA, MHA

from codellama_jax import state
from codellama_jax.convert import table


def test_the_table_has_a_row_for_each_weight_of_the_model_and_no_other():
    lengths = table.sizes(GQA)
    model_has = {}

    def walk(tree, path):
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, [*path, key])
            else:
                model_has[".".join([*path, key])] = value.shape

    walk(state.abstract_params(GQA), [])
    shapes = {row.ours: table.shape(row.ours_axes, lengths) for row in table.TABLE}
    for row in table.TABLE:
        if row.stacked:
            shapes[row.ours] = (GQA.num_layers, *shapes[row.ours])
    assert shapes == model_has


def test_each_tensor_is_listed_once_in_the_order_of_the_forward_pass():
    names = [tensor.hf for tensor in table.tensors(MHA)]
    assert len(set(names)) == len(names) == 3 + 9 * MHA.num_layers
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "lm_head.weight"
    assert names.index("model.layers.1.self_attn.q_proj.weight") == 3 + 8


def test_metas_interleaved_pairs_become_halves():
    """Section 10, fact 5: one head of 8 permutes as [0, 2, 4, 6, 1, 3, 5, 7]."""
    lengths = {"N": 1, "h": 4, "two": 2, "D": 1}
    x = np.arange(8).reshape(8, 1)
    halves = table.rearrange(x, "(N h two) D", "(N two h) D", lengths)
    assert halves.ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("row", table.TABLE, ids=lambda row: row.ours)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_any_format_into_any_other_and_back_is_the_identity(row, dtype):
    lengths = table.sizes(GQA)
    formats = (row.ours_axes, row.meta_axes, row.hf_axes)
    for here in formats:
        x = np.random.default_rng(0).normal(size=table.shape(here, lengths)).astype(dtype)
        for there in formats:
            y = table.rearrange(x, here, there, lengths)
            assert y.shape == table.shape(there, lengths) and y.flags.c_contiguous
            assert table.rearrange(y, there, here, lengths).tobytes() == x.tobytes()


def test_ours_to_meta_through_hugging_face_is_ours_to_meta():
    lengths = table.sizes(GQA)
    for row in table.TABLE:
        x = np.random.default_rng(0).normal(size=table.shape(row.ours_axes, lengths))
        direct = table.rearrange(x, row.ours_axes, row.meta_axes, lengths)
        hf = table.rearrange(x, row.ours_axes, row.hf_axes, lengths)
        assert (table.rearrange(hf, row.hf_axes, row.meta_axes, lengths) == direct).all()


def test_rotating_interleaved_pairs_and_rotating_halves_give_the_same_scores():
    """Meta's complex rotation on Meta's weights, ours on ours: equal products of q and k."""
    lengths = table.sizes(GQA)
    rng = np.random.default_rng(0)
    wq, wk = (rng.normal(size=(heads * 4, 64)) for heads in (16, 8))
    x_TD = rng.normal(size=(6, 64))
    angles = np.outer(np.arange(6), [1.0, 0.1])[:, None]  # T 1 h

    def interleaved(w):
        pairs = (x_TD @ w.T).reshape(6, -1, 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(6, -1, 4)

    def halves(w, axes, to):
        w_DNH = table.rearrange(w, axes, to, lengths)
        first, second = np.split(np.einsum("TD,DNH->TNH", x_TD, w_DNH), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    k_ours = halves(wk, "(K h two) D", "D K (two h)")
    scores = np.einsum("TNH,SNH->NTS", interleaved(wk), interleaved(wk))
    ours = np.einsum("TNH,SNH->NTS", k_ours, k_ours)
    np.testing.assert_allclose(ours, scores, atol=1e-9)
    q_ours, q_meta = halves(wq, "(N h two) D", "D N (two h)"), interleaved(wq)
    np.testing.assert_allclose(
        np.einsum("TKGH,SKH->KGTS", q_ours.reshape(6, 8, 2, 4), k_ours),
        np.einsum("TKGH,SKH->KGTS", q_meta.reshape(6, 8, 2, 4), interleaved(wk)),
        atol=1e-9,
    )
