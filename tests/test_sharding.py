import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
import spine_fixture as tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from codellama_jax import config, model, optim, sharding, state, step

WIDE = replace(tiny.MODEL, num_heads=8, num_kv_heads=4, vocab_size=128)
# eps=1: Adam's update is nearly linear in the gradient, so rounding is not blown up
GENTLE = replace(tiny.OPTIM, eps=1.0)
TX = optim.adamw(GENTLE, steps=8)


# -- the mesh ------------------------------------------------------------------------------------
def test_one_axis_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(config.Layout(data=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert dict(sharding.make_mesh(config.Layout()).shape)["fsdp"] == 8


@pytest.mark.parametrize(
    "axes, parts",
    [
        ({"tensor": 3}, ("8 devices", "data . tensor . context = 3")),
        ({"data": 16}, ("8 devices", "= 16")),
        ({"fsdp": 4}, ("'fsdp': 4", "needs 4 devices, there are 8", "fsdp=-1")),
        ({"data": 4, "fsdp": 4}, ("needs 16 devices, there are 8",)),
        ({"context": 3}, ("8 devices", "data . tensor . context = 3")),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes, parts):
    with pytest.raises(ValueError, match="".join(f"(?=.*{part})" for part in parts)):
        sharding.make_mesh(config.Layout(**axes))


@pytest.mark.parametrize(
    "axes, sentence",
    [
        (
            {"tensor": 8},
            "layers.attention.wk has 4 kv_heads, which 8 devices of mesh axis 'tensor'",
        ),
        ({"fsdp": 3}, "layers.attention.wk has 64 embed, which 3 devices of mesh axis 'fsdp'"),
        (
            {"fsdp": 2, "context": 3},
            "layers.attention.wk has 64 embed, which 6 devices of mesh axis 'fsdp' x 'context'",
        ),
    ],
)
def test_a_weight_that_does_not_divide_is_named(axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        state.param_shardings(WIDE, tiny.mesh(**axes))


def test_a_logical_axis_that_is_not_in_the_table_is_our_mistake():
    with pytest.raises(KeyError, match="embedd"):
        sharding.spec("embedd")
    assert set(jax.tree.leaves(state.param_axes(WIDE))) <= set(sharding.AXIS_RULES)


def test_activations_are_left_alone_outside_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x


def test_rows_lie_over_data_and_fsdp():
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    batch = sharding.global_batch(tiny.random_batch(), mesh)
    assert batch["tokens"].sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 33)}
    np.testing.assert_array_equal(batch["tokens"], tiny.random_batch()["tokens"])


# -- the state -----------------------------------------------------------------------------------
@functools.cache
def random_state(**axes) -> state.TrainState:
    return state.random_state(WIDE, TX, tiny.mesh(**axes), seed=1)


def test_no_weight_or_moment_lies_whole_on_a_device():
    made = random_state(fsdp=4, tensor=2)
    for path, leaf in jax.tree.leaves_with_path(made):
        name = jax.tree_util.keystr(path)
        held = {shard.data.size for shard in leaf.addressable_shards}
        whole = leaf.ndim == 0 or name.endswith("norm']")
        assert held == {leaf.size if whole else leaf.size // 8}, name
    sizes = [leaf.size for leaf in jax.tree.leaves(made) if leaf.ndim]
    assert sum(sizes) == 3 * WIDE.num_params  # weights and two moments


def test_replicas_hold_the_same():
    made = random_state(data=2, fsdp=2, tensor=2)
    assert {s.data.size for s in made.params["output"].addressable_shards} == {64 * 128 // 4}


def test_random_weights_are_the_same_on_every_mesh():
    assert_equal(random_state(fsdp=4, tensor=2), random_state())
    assert_equal(random_state(data=2, fsdp=2, tensor=2), random_state())


def test_a_state_around_given_weights_takes_them_as_they_are():
    mesh = tiny.mesh(fsdp=4, tensor=2)
    given = jax.device_put(tiny.params(WIDE), state.param_shardings(WIDE, mesh))
    kept = jax.device_get(given)
    made = state.state_from_params(given, WIDE, TX, mesh)
    assert_equal(made.params, kept)
    assert int(made.step) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(made.opt_state))


def test_the_abstract_state_says_where_everything_lies():
    made = random_state(fsdp=4, tensor=2)
    abstract = state.abstract_state(WIDE, TX, tiny.mesh(fsdp=4, tensor=2))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(abstract), jax.tree.leaves(made), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim), path


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


# -- rows over the context axis ------------------------------------------------------------------
def test_a_device_of_the_context_axis_takes_an_early_and_a_late_slice():
    row = np.arange(12)
    np.testing.assert_array_equal(
        sharding.balance(row, 3, axis=0).reshape(3, 4),
        [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]],
    )
    work = (sharding.balance(row, 3, axis=0).reshape(3, 4) + 1).sum(axis=1)  # keys it looks at
    assert len(set(work.tolist())) == 1


@given(
    context=st.integers(1, 5),
    size=st.integers(1, 3),
    trailing=st.sampled_from([(), (2,)]),
    form=st.sampled_from([np.asarray, jax.numpy.asarray]),
)
@settings(max_examples=20, deadline=None)
def test_rows_come_back_from_the_balanced_order(context, size, trailing, form):
    shape = (2, 2 * context * size, *trailing)
    rows = form(np.arange(np.prod(shape)).reshape(shape))
    there = sharding.balance(rows, context)
    assert sorted(np.asarray(there).ravel()) == list(range(rows.size))
    np.testing.assert_array_equal(sharding.unbalance(there, context), rows)
    np.testing.assert_array_equal(there[:, :, ...], sharding.balance(rows, context, axis=1))


def test_rows_that_do_not_divide_among_the_context_are_refused_with_what_would():
    stage = tiny.stage(layout={"context": 6})
    with pytest.raises(ValueError, match="32 tokens .* 2 . context = 12 .*layout.context=2"):
        step.make_train_step(stage, "cpu")
    with pytest.raises(ValueError, match="31 tokens .*layout.context=1"):
        sharding.balance(np.arange(31), 2, axis=0)


# -- one step ------------------------------------------------------------------------------------
@functools.cache
def stepped(microbatches: int, isolated: bool = True, **axes):
    """Metrics, weights and first moments (a tenth of the clipped gradient) after one step."""
    data = replace(tiny.stage().data, batch_tokens=32 * 32, attend_across_documents=not isolated)
    stage = tiny.stage(
        model=WIDE,
        optim=GENTLE,
        data=data,
        layout={"microbatches": microbatches, "context": axes.get("context", 1)},
    )
    mesh = tiny.mesh(**axes)
    weights = jax.device_put(tiny.params(WIDE), state.param_shardings(WIDE, mesh))
    before = state.state_from_params(weights, WIDE, optim.adamw(stage.optim, stage.steps), mesh)
    with jax.set_mesh(mesh):
        batch = sharding.global_batch(tiny.random_batch(32), mesh)
        after, metrics = jax.jit(step.make_train_step(stage, "cpu"))(before, batch)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    return jax.device_get((metrics, after.params, after.opt_state[1].mu))


SLOW = pytest.mark.slow
MESHES = [  # data, fsdp, tensor, context
    pytest.param((1, 1, 1, 1), marks=[]),
    pytest.param((8, 1, 1, 1), marks=SLOW),
    pytest.param((1, 8, 1, 1), marks=[]),
    pytest.param((2, 2, 2, 1), marks=SLOW),
    pytest.param((1, 2, 4, 1), marks=SLOW),
    pytest.param((1, 2, 2, 2), marks=[]),
    pytest.param((2, 1, 2, 2), marks=SLOW),
    pytest.param((2, 2, 1, 2), marks=SLOW),
    pytest.param((1, 1, 2, 4), marks=SLOW),
    pytest.param((1, 1, 1, 8), marks=SLOW),
]


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("microbatches, isolated", [(4, True), pytest.param(1, False, marks=SLOW)])
def test_a_step_does_not_depend_on_mesh_and_accumulation(microbatches, isolated, axes):
    axes = dict(zip(sharding.MESH_AXES, axes, strict=True))
    check_step(stepped(microbatches, isolated, **axes), stepped(1, isolated))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}])
def test_nor_does_it_where_the_axes_of_wo_are_merged_before_it_is_gathered(axes, monkeypatch):
    monkeypatch.setattr(model, "WIDE", 1)
    check_step(stepped.__wrapped__(4, **axes), stepped(1))
    with jax.set_mesh(tiny.mesh(**axes)):
        made = jax.make_jaxpr(model.product)(
            np.ones((2, 4, 2, 8), np.float32), nnx.Param(jax.numpy.ones((2, 8, 16)))
        )
    assert "optimization_barrier" in str(made)


def check_step(got, want):
    (metrics, params, gradients), (want_metrics, want_params, want_gradients) = got, want
    assert metrics["tokens"] == want_metrics["tokens"] == tiny.random_batch(32)["loss_mask"].sum()
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-6, err_msg=name)
    leaves = zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True)
    for (path, got), want in leaves:
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-5, jax.tree_util.keystr(path)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
