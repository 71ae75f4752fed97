"""Our model and our step against a torch model written here from the published formulas.

It knows nothing of our code: complex rotary numbers over neighbouring pairs, as in Meta's paper and
files, which it opens with torch.load. Llama 2: arXiv 2307.09288 section 2.2; rotary embedding:
2104.09864; SwiGLU: 2002.05202; RMSNorm: 1910.07467; grouped heads: 2305.13245; AdamW: 1711.05101.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spine_fixture as tiny
from convert_fixture import GQA, MHA

import codellama_jax
from codellama_jax import config, convert, optim, sharding, state, step
from codellama_jax.convert import run, weights
from codellama_jax.generate import Sampling
from codellama_jax.model import Compute

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("default")  # theirs

F = torch.nn.functional
FLOAT32 = Compute(jnp.dtype("float32"), "none")
MODELS = [MHA, GQA, replace(MHA, rope_theta=1e4), replace(GQA, rope_theta=1e4)]
IDS = ["mha-1e6", "gqa-1e6", "mha-1e4", "gqa-1e4"]


# -- the reference -----------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x_BTNH, positions_T, base):
    """Neighbouring pairs as complex numbers, pair j turned by position * base^(-2j/H).

    Angles are float32 and rounded as in both references: exact ones move logits by 5e-5 of the
    largest at position 16,000.
    """
    H = x_BTNH.shape[-1]
    frequencies = 1 / base ** (torch.arange(0, H, 2).float() / H)
    angles = positions_T.float()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x_BTNH.reshape(*x_BTNH.shape[:-1], H // 2, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def attention(w, layer, x, positions, model):
    B, T, _ = x.shape
    q, k, v = (
        (x @ w[f"layers.{layer}.attention.w{name}.weight"].T).reshape(B, T, -1, model.head_dim)
        for name in "qkv"
    )
    q, k = (rotated(heads, positions, model.rope_theta) for heads in (q, k))
    k, v = (x.repeat_interleave(model.num_heads // model.num_kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / model.head_dim**0.5
    scores = scores + torch.full((T, T), -torch.inf).triu(1)
    mixed = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v).flatten(2)
    return mixed @ w[f"layers.{layer}.attention.wo.weight"].T


def feed_forward(w, layer, x):
    w1, w2, w3 = (w[f"layers.{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def logits(w, tokens, model, first=0):
    """[B, T, V]; `first` is the position of the first token."""
    positions = torch.arange(first, first + tokens.shape[1])
    x = w["tok_embeddings.weight"][tokens]
    for i in range(model.num_layers):
        norm = [w[f"layers.{i}.{name}_norm.weight"] for name in ("attention", "ffn")]
        x = x + attention(w, i, rms_norm(x, norm[0], model.norm_eps), positions, model)
        x = x + feed_forward(w, i, rms_norm(x, norm[1], model.norm_eps))
    return rms_norm(x, w["norm.weight"], model.norm_eps) @ w["output.weight"].T


# -- the same weights on both sides ------------------------------------------------------------


def pair(model, folder):
    """(our parameters, torch's tensors) of one random model, both read from Meta's files."""
    params = jax.tree.map(np.asarray, state.init_params(model, seed=3))
    rng = np.random.default_rng(4)  # norms begin as ones, which would hide a mix-up
    for tree, name in (
        (params["layers"], "attention_norm"),
        (params["layers"], "ffn_norm"),
        (params, "norm"),
    ):
        tree[name] = tree[name] + rng.normal(0, 0.1, tree[name].shape).astype(np.float32)
    folder.mkdir()
    run._write(weights.from_params(params, model), "meta", folder, {})
    theirs = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return convert.read_params(folder, say=lambda line: None)[1], theirs


def tokens_of(model, shape):
    return np.random.default_rng(5).integers(0, model.vocab_size, shape)


def error(ours, theirs):
    """The largest difference, as a part of the largest value."""
    theirs = theirs.detach().numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("model", MODELS, ids=IDS)
@pytest.mark.parametrize("first", [0, 16_000])
def test_logits_are_those_of_the_formulas(tmp_path, model, first):
    params, theirs = pair(model, tmp_path / "meta")
    tokens = tokens_of(model, (2, 96))
    bound = state.bind(model, jax.tree.map(jnp.asarray, params))
    positions_BT = jnp.tile(jnp.arange(first, first + 96), (2, 1))
    ours = bound.logits(bound(jnp.asarray(tokens), positions_BT, compute=FLOAT32))
    assert error(ours, logits(theirs, torch.tensor(tokens), model, first)) < 1e-5


def test_decoding_continues_as_the_formulas_do(tmp_path):
    _, theirs = pair(GQA, tmp_path / "meta")
    llama = codellama_jax.load(tmp_path / "meta")
    ids = tokens_of(GQA, (1, 12))
    assert error(llama.logits(ids), logits(theirs, torch.tensor(ids), GQA)) < 1e-5
    written = llama.generate(ids.tolist(), Sampling(8))[0].tokens
    text = torch.tensor(ids)
    for token in written:
        assert logits(theirs, text, GQA)[0, -1].argmax() == token
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


def as_meta(params, folder):
    """A tree of our shape (weights, or their gradients) under Meta's names, as torch opens it."""
    folder.mkdir()
    run._write(weights.from_params(jax.device_get(params), GQA), "meta", folder, {})
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def assert_close(ours, theirs, tolerance):
    """Every tensor, by the norm of the difference as a part of the reference's norm."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() < tolerance * tensor.norm(), name


ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "clip_norm": 0.5}


def torch_step(w, tokens, rate):
    """(loss, gradients, norm before clipping) of one step of torch's AdamW, which changes `w`."""
    for tensor in w.values():
        tensor.requires_grad_()
    told = logits(w, torch.tensor(tokens[:, :-1]), GQA)
    loss = F.cross_entropy(told.flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten())
    loss.backward()
    gradients = {name: tensor.grad.clone() for name, tensor in w.items()}
    norm = torch.nn.utils.clip_grad_norm_(w.values(), ADAM["clip_norm"])
    decayed = [tensor for tensor in w.values() if tensor.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": ADAM["weight_decay"]},
        {"params": [t for t in w.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=rate, betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["eps"]).step()
    for tensor in w.values():
        tensor.requires_grad_(False)
    return loss.item(), gradients, norm.item()


def test_the_gradients_and_one_step_of_adamw_are_torchs(tmp_path):
    """From the same weights and the same batch; the norm is clipped, and matrices decay."""
    stage = tiny.stage(
        model=GQA,
        data=replace(tiny.stage().data, batch_tokens=4 * 32),
        optim=config.Optim(peak_lr=1e-3, warmup_steps=0, final_lr_ratio=0.1, **ADAM),
    )
    params, theirs = pair(GQA, tmp_path / "meta")
    params = jax.tree.map(jnp.asarray, params)
    batch = tiny.batch([[row] for row in tokens_of(GQA, (4, 33)).tolist()])
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    rate = float(optim.learning_rate(stage.optim, stage.steps)(1))
    loss, gradients, norm = torch_step(theirs, batch["tokens"].astype(int), rate)
    assert norm > ADAM["clip_norm"]

    def mean_loss(params):
        llama = state.bind(stage.model, params)
        nll_BT, mask_BT = step.token_losses(llama, batch, FLOAT32, 32, isolated=True)
        return nll_BT.sum() / mask_BT.sum()

    ours = as_meta(jax.jit(jax.grad(mean_loss))(params), tmp_path / "gradients")
    assert_close(ours, gradients, 1e-5)

    tx, mesh = optim.adamw(stage.optim, stage.steps), sharding.make_mesh(stage.layout)
    start = state.state_from_params(params, GQA, tx, mesh)
    with jax.set_mesh(mesh):
        after, metrics = jax.jit(step.make_train_step(stage, "cpu"))(start, batch)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    moved = as_meta(after.params, tmp_path / "after")
    assert_close(
        {name: moved[name] - before[name] for name in moved},
        {name: theirs[name] - before[name] for name in theirs},
        1e-4,
    )
