import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spine_fixture as tiny

from codellama_jax import config, convert, optim, state, step


def loss_sum(stage: config.Stage):
    """(params, batch) -> sum of losses and number of targets, as make_train_step sums them."""
    compute = step.Compute.of(stage.layout, "cpu")
    isolated = not stage.data.attend_across_documents

    def of(params, batch):
        llama = state.bind(stage.model, params)
        nll_BT, mask_BT = step.token_losses(
            llama, batch, compute, stage.layout.loss_chunk, isolated
        )
        return jnp.sum(nll_BT), jnp.sum(mask_BT)

    return of


@functools.cache
def _compiled(stage_json: str):
    stage = config.from_json(config.Stage, json.loads(stage_json))
    return jax.jit(jax.value_and_grad(loss_sum(stage), has_aux=True))


def value_and_grads(batch, params=None, **changes):
    """Sum of the losses, number of targets, gradients."""
    compiled = _compiled(json.dumps(config.to_json(tiny.stage(**changes))))
    (total, tokens), grads = compiled(tiny.params() if params is None else params, batch)
    return total, tokens, grads


def assert_close(got, want, tolerance):
    leaves = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in leaves:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


# -- against torch: tests/material/hf_train_gqa/recipe.json says the formulas --------------------
class Oracle:
    def __init__(self, folder):
        self.model, self.params = convert.read_params(
            folder / "init", "float32", say=lambda _: None
        )
        self.gradients = dict(np.load(folder / "grads_step0.npz"))
        run = np.load(folder / "train_oracle.npz")
        self.loss, self.grad_norm, self.lr = run["loss"], run["grad_norm"], run["lr"]
        self.tokens, self.mask = run["data"], run["mask"]
        self.recipe = json.loads((folder / "recipe.json").read_text())

    def batch(self, number):
        tokens = self.tokens[number]
        return {
            "tokens": tokens,
            "loss_mask": np.insert(self.mask[number] > 0, 0, False, axis=1),
            "segments": np.ones_like(tokens),
            "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
            "corpus": np.zeros(len(tokens), np.int32),
        }

    def rate(self, step):
        peak, warm, steps = (self.recipe[k] for k in ("peak_lr", "warmup_steps", "steps"))
        cosine = 0.1 + 0.9 * (1 + jnp.cos(jnp.pi * (step - warm) / (steps - warm))) / 2
        return peak * jnp.where(step < warm, (step + 1) / warm, cosine)

    def stage(self):
        return tiny.stage(
            model=self.model,
            data=replace(tiny.stage().data, seq_len=64, batch_tokens=4 * 64),
            optim=config.Optim(
                peak_lr=self.recipe["peak_lr"],
                warmup_steps=self.recipe["warmup_steps"],
                final_lr_ratio=0.1,
                beta1=0.9,
                beta2=0.95,
                eps=self.recipe["eps"],
                weight_decay=self.recipe["weight_decay_on_2d_or_more"],
                clip_norm=self.recipe["clip_global_norm"],
            ),
            steps=self.recipe["steps"],
        )


@pytest.fixture(scope="module")
def oracle(material):
    return Oracle(material / "hf_train_gqa")


def test_the_first_gradients_are_those_of_torch(oracle):
    stage = oracle.stage()
    of = jax.jit(jax.value_and_grad(loss_sum(stage), has_aux=True))
    (total, tokens), grads = of(oracle.params, oracle.batch(0))
    np.testing.assert_allclose(total / tokens, oracle.gradients.pop("loss"), rtol=1e-6)
    assert_close(
        jax.tree.map(lambda g: g / tokens, grads), _ours(oracle.gradients, oracle.model), 1e-5
    )


def _ours(named, model):
    """Torch's [out, in] matrices under Hugging Face's names, as our tree."""

    def layers(name, shape):
        matrices = [named[f"model.layers.{i}.{name}.weight"].T for i in range(model.num_layers)]
        return np.stack(matrices).reshape(model.num_layers, *shape)

    D, N, K, H, F = model.dim, model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_dim
    return {
        "tok_embeddings": named["model.embed_tokens.weight"],
        "layers": {
            "attention": {
                "wq": layers("self_attn.q_proj", (D, N, H)),
                "wk": layers("self_attn.k_proj", (D, K, H)),
                "wv": layers("self_attn.v_proj", (D, K, H)),
                "wo": layers("self_attn.o_proj", (N, H, D)),
            },
            "feed_forward": {
                "w1": layers("mlp.gate_proj", (D, F)),
                "w2": layers("mlp.down_proj", (F, D)),
                "w3": layers("mlp.up_proj", (D, F)),
            },
            "attention_norm": layers("input_layernorm", (D,)),
            "ffn_norm": layers("post_attention_layernorm", (D,)),
        },
        "norm": named["model.norm.weight"],
        "output": named["lm_head.weight"].T,
    }


def test_thirty_steps_of_training_go_as_in_torch(oracle, monkeypatch):
    # its schedule counts from 0 and warms up from 1/5, so ours is replaced; all else is ours
    monkeypatch.setattr(optim, "learning_rate", lambda *_: lambda count: oracle.rate(count - 1))
    stage = oracle.stage()
    tx = optim.adamw(stage.optim, stage.steps)
    train_step = jax.jit(step.make_train_step(stage, "cpu"))
    train_state = state.TrainState(jnp.int32(0), oracle.params, tx.init(oracle.params))
    lines = []
    for number in range(stage.steps):
        train_state, metrics = train_step(train_state, oracle.batch(number))
        lines.append([float(metrics[k]) for k in ("loss", "grad_norm", "learning_rate")])
    loss, grad_norm, rate = np.array(lines).T
    np.testing.assert_allclose(rate, oracle.lr, rtol=1e-5)
    np.testing.assert_allclose(loss, oracle.loss, rtol=2e-5)
    np.testing.assert_allclose(grad_norm, oracle.grad_norm, rtol=2e-4)


# -- what the loss does not depend on ------------------------------------------------------------
DOCUMENTS = [tiny.document(length, seed=length) for length in (12, 20, 5, 28, 9, 16, 3, 15)]
TWO_TO_A_ROW = tiny.batch([DOCUMENTS[i : i + 2] for i in range(0, 8, 2)], capacity=37)
ONE_TO_A_ROW = tiny.batch([[d] for d in reversed(DOCUMENTS)], capacity=29)


def test_the_loss_does_not_depend_on_how_documents_were_packed():
    total, tokens, grads = value_and_grads(TWO_TO_A_ROW)
    other_total, other_tokens, other_grads = value_and_grads(ONE_TO_A_ROW)
    assert tokens == other_tokens == sum(len(d) - 1 for d in DOCUMENTS)
    np.testing.assert_allclose(total, other_total, rtol=1e-6)
    assert_close(grads, other_grads, 1e-5)


def test_the_loss_does_not_depend_on_accumulation():
    batch = tiny.random_batch(8)
    masks = batch["loss_mask"].sum(axis=1)
    assert len(set(masks.tolist())) > 2  # a mean of means would differ
    of = loss_sum(tiny.stage())
    got = jax.jit(lambda p, b: step.accumulate(of, p, b, 4))(tiny.params(), batch)
    want = value_and_grads(batch)
    assert got[1] == want[1]
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert_close(got[2], want[2], 1e-5)


def test_microbatches_take_every_row_once():
    rows = {"tokens": jnp.arange(8)[:, None]}

    def seen(params, part):
        return jnp.sum(params[part["tokens"][:, 0]]), part["tokens"].size

    total, tokens, counts = step.accumulate(seen, jnp.ones(8), rows, 4)
    assert (total, tokens) == (8, 8)
    np.testing.assert_array_equal(counts, np.ones(8))


def test_what_is_masked_does_not_matter():
    batch = tiny.random_batch(4)
    masked = dict(batch, tokens=batch["tokens"].copy())
    padding = batch["segments"] == 0
    assert padding.any()
    masked["tokens"][padding] = 77
    np.testing.assert_array_equal(value_and_grads(batch)[0], value_and_grads(masked)[0])
    half = dict(batch, loss_mask=batch["loss_mask"] & (np.arange(33) % 2 == 0))
    other = dict(batch, loss_mask=batch["loss_mask"] & (np.arange(33) % 2 == 1))
    parts = value_and_grads(half), value_and_grads(other)
    np.testing.assert_allclose(parts[0][0] + parts[1][0], value_and_grads(batch)[0], rtol=1e-6)


def test_a_step_without_targets_learns_nothing_and_stays_finite():
    stage = tiny.stage(optim=replace(tiny.OPTIM, weight_decay=0.0))
    batch = tiny.random_batch(8)
    batch["loss_mask"][:] = False
    tx = optim.adamw(stage.optim, stage.steps)
    before = state.TrainState(jnp.int32(0), tiny.params(), tx.init(tiny.params()))
    after, metrics = jax.jit(step.make_train_step(stage, "cpu"))(before, batch)
    assert (metrics["loss"], metrics["tokens"], metrics["grad_norm"]) == (0, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_documents_see_each_other_only_where_the_stage_says_so():
    across = replace(tiny.stage().data, attend_across_documents=True)
    joined = value_and_grads(TWO_TO_A_ROW, data=across)[0]
    assert abs(joined - value_and_grads(TWO_TO_A_ROW)[0]) > 1e-2
    one_segment = dict(
        TWO_TO_A_ROW,
        segments=np.ones_like(TWO_TO_A_ROW["segments"]),
        positions=np.broadcast_to(np.arange(37, dtype=np.int32), (4, 37)),
    )
    np.testing.assert_allclose(joined, value_and_grads(one_segment)[0], rtol=1e-6)


# -- cross-entropy in chunks ---------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_cross_entropy_in_chunks_is_the_same(chunk):
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(3, 32, tiny.MODEL.dim)).astype(np.float32)
    targets_BT = rng.integers(0, tiny.MODEL.vocab_size, (3, 32))
    weights_BT = rng.normal(size=(3, 32)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def losses_and_grads(chunk, params, x_BTD):
        def weighted(params, x_BTD):
            llama = state.bind(tiny.MODEL, params)
            nll_BT = step.chunked_cross_entropy(llama, x_BTD, targets_BT, chunk)
            return jnp.sum(nll_BT * weights_BT), nll_BT

        return jax.value_and_grad(weighted, (0, 1), has_aux=True)(params, x_BTD)

    whole = losses_and_grads(32, tiny.params(), x_BTD)
    parts = losses_and_grads(chunk, tiny.params(), x_BTD)
    np.testing.assert_allclose(parts[0][1], whole[0][1], rtol=1e-5)
    assert_close(parts[1], whole[1], 1e-5)
    logits_BTV = x_BTD.astype(np.float64) @ np.asarray(tiny.params()["output"], np.float64)
    log_sum_BT = np.log(np.exp(logits_BTV).sum(-1))
    picked_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(whole[0][1], log_sum_BT - picked_BT, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_cross_entropy_has_the_gradient_of_its_formula(dtype, tolerance):
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(3 * rng.normal(size=(2, 8, 16)), dtype)
    w_DV = jnp.asarray(rng.normal(size=(16, 48)), dtype)
    targets_BT = rng.integers(0, 48, (2, 8))
    mask_BT = rng.integers(0, 2, (2, 8)).astype(np.float32)

    def formula(x_BTD, w_DV):
        log_p_BTV = jax.nn.log_softmax(jnp.einsum("BTD,DV->BTV", x_BTD, w_DV), axis=-1)
        return -jnp.sum(mask_BT * jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0])

    def ours(x_BTD, w_DV):
        return jnp.sum(mask_BT * step.cross_entropy(x_BTD[None], w_DV, targets_BT[None])[0])

    loss, grads = jax.value_and_grad(ours, (0, 1))(x_BTD, w_DV)
    as_float32 = (x_BTD.astype(jnp.float32), w_DV.astype(jnp.float32))
    wanted_loss, wanted = jax.value_and_grad(formula, (0, 1))(*as_float32)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        assert_close(grad.astype(jnp.float32), want, tolerance)


@pytest.mark.parametrize("chunk", [8, 12])
def test_the_float32_logits_of_a_whole_row_never_exist(chunk):
    batch = tiny.random_batch(8)

    def logits(chunk):
        """Positions whose logits stand in one float32 array, for every array of logits."""
        stage = tiny.stage(layout={"loss_chunk": chunk, "compute_dtype": "bfloat16"})
        V = stage.model.vocab_size
        grad = jax.grad(lambda p, b: loss_sum(stage)(p, b)[0])
        values = _values(jax.make_jaxpr(grad)(tiny.params(), batch).jaxpr)
        shapes = {value.shape for value in values if value.dtype == jnp.float32}
        return {int(np.prod(s)) // V for s in shapes if s[-1:] == (V,) and len(s) > 2}

    assert max(logits(chunk)) == 8 * chunk
    assert max(logits(32)) == 8 * 32  # the check can see them


def _values(jaxpr) -> set:
    """Every value in a program and in the programs inside it, by shape and dtype."""
    values = {v.aval for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "shape")}
    for inner in _inner(jaxpr):
        values |= _values(inner)
    return values


def _inner(jaxpr):
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield inner


# -- a step --------------------------------------------------------------------------------------
def test_bfloat16_trains_close_to_float32():
    batch = tiny.random_batch(8)
    want = value_and_grads(batch)
    got = value_and_grads(batch, layout={"compute_dtype": "bfloat16"})
    np.testing.assert_allclose(got[0], want[0], rtol=2e-3)
    assert_close(got[2], want[2], 0.04)
    assert {g.dtype.name for g in jax.tree.leaves(got[2])} == {"float32"}


def test_a_step_counts_itself_and_learns_its_batch():
    stage = tiny.stage()
    tx = optim.adamw(stage.optim, stage.steps)
    train_step = jax.jit(step.make_train_step(stage, "cpu"))
    train_state = state.TrainState(jnp.int32(0), tiny.params(), tx.init(tiny.params()))
    schedule = optim.learning_rate(stage.optim, stage.steps)
    losses = []
    for number in range(1, 6):
        train_state, metrics = train_step(train_state, tiny.random_batch(8))
        assert train_state.step == number
        assert metrics["learning_rate"] == pytest.approx(float(schedule(number)))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


# -- jax-ml/jax#39025: gradients outside jit, of gathers on a middle axis ------------------------
def test_a_step_outside_jit_is_refused():
    stage = tiny.stage()
    before = state.TrainState(jnp.int32(0), tiny.params(), None)
    with pytest.raises(ValueError, match=r"inside jax.jit only: use jax.jit\(train_step\)"):
        step.make_train_step(stage, "cpu")(before, tiny.random_batch(8))


def test_gradients_are_taken_in_the_step_and_nowhere_else():
    taken = re.compile(r"\b(grad|value_and_grad|vjp|linearize|jacrev|hessian)\(")
    package = Path(step.__file__).parent
    found = {file.name for file in package.rglob("*.py") if taken.search(file.read_text())}
    assert found == {"step.py"}


@pytest.mark.parametrize("context", [1, 4])
def test_nothing_differentiable_is_gathered_on_a_middle_axis(context):
    layout = {"loss_chunk": 8, "context": context}
    of = loss_sum(tiny.stage(layout=layout))
    program = jax.make_jaxpr(lambda p, b: of(p, b)[0])(tiny.params(), tiny.random_batch(8))
    gathers = [
        (eqn.invars[0].aval, eqn.params["dimension_numbers"])
        for eqn in _equations(program.jaxpr)
        if eqn.primitive.name == "gather" and eqn.invars[0].aval.dtype == jnp.float32
    ]
    assert gathers  # of the embedding
    for operand, numbers in gathers:
        assert set(numbers.start_index_map) <= {0, operand.ndim - 1}


def _equations(jaxpr):
    yield from jaxpr.eqns
    for inner in _inner(jaxpr):
        yield from _equations(inner)
