"""The pure part of training: the loss, and one optimizer step.

The loss of a step is a sum over target tokens divided by their count, so it does not depend on the
mesh, on gradient accumulation, or on how documents were packed.

Axes: B batch  T position  D width  V vocabulary  P chunks of a row  C positions of a chunk
"""

import jax
import jax.numpy as jnp
import optax

from codellama_jax import config, optim, sharding, state
from codellama_jax.model import Compute, Llama

Batch = dict[str, jax.Array]  # tokens, loss_mask, segments, positions: [B, T + 1]; corpus: [B]


def make_train_step(stage: config.Stage, platform: str):
    """Returns train_step(TrainState, Batch) -> (TrainState, metrics), to be jitted.

    metrics: loss (nats per target token), tokens (targets), tokens_by_corpus [corpora of the mix],
    grad_norm (before clipping), learning_rate. Raises ValueError when rows do not divide among the
    devices of the context axis.
    """
    sharding.check_length(stage.data.seq_len, stage.layout.context)
    tx = optim.adamw(stage.optim, stage.steps)
    schedule = optim.learning_rate(stage.optim, stage.steps)
    compute = Compute.of(stage.layout, platform)
    isolated = not stage.data.attend_across_documents

    def loss_sum(params, batch: Batch):
        nll_BT, mask_BT = token_losses(
            state.bind(stage.model, params), batch, compute, stage.layout.loss_chunk, isolated
        )
        return jnp.sum(nll_BT), jnp.sum(mask_BT)

    def train_step(train_state: state.TrainState, batch: Batch):
        # libtpu 0.0.42.1 takes wrong gradients outside jit, silently (jax-ml/jax#39025)
        traced = isinstance(batch["tokens"], jax.core.Tracer)
        config.check(traced, "a training step runs inside jax.jit only: use jax.jit(train_step)")
        total, tokens, grads = accumulate(
            loss_sum, train_state.params, batch, stage.layout.microbatches
        )
        count = jnp.maximum(tokens, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = tx.update(grads, train_state.opt_state, train_state.params)
        metrics = {
            "loss": total / count,
            "tokens": tokens,
            "tokens_by_corpus": by_corpus(batch, len(stage.data.mix)),
            "grad_norm": optim.global_norm(grads),
            "learning_rate": schedule(train_state.step + 1),
        }
        params = optax.apply_updates(train_state.params, updates)
        return state.TrainState(train_state.step + 1, params, opt_state), metrics

    return train_step


def by_corpus(batch: Batch, corpora: int) -> jax.Array:
    """Number of targets of each corpus, int32 [corpora]."""
    targets_B = jnp.sum(batch["loss_mask"][:, 1:], axis=1)
    return jnp.zeros(corpora, jnp.int32).at[batch["corpus"]].add(targets_B)


def accumulate(loss_sum, params, batch: Batch, microbatches: int):
    """Sums of loss, tokens and gradients over the microbatches, one after another."""
    grad = jax.value_and_grad(loss_sum, has_aux=True)
    if microbatches == 1:
        (total, tokens), grads = grad(params, batch)
        return total, tokens, grads

    def split(x):  # [B, ...] -> [microbatches, B / microbatches, ...]; strided: stays on its device
        x = x.reshape(-1, microbatches, *x.shape[1:])
        return sharding.constrain(jnp.swapaxes(x, 0, 1), None, "batch", *[None] * (x.ndim - 2))

    def add(sums, part):
        (total, tokens), grads = grad(params, part)
        return jax.tree.map(jnp.add, sums, (total, tokens, grads)), None

    zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, jax.tree.map(split, batch))[0]


def token_losses(
    llama: Llama, batch: Batch, compute: Compute, chunk: int, isolated: bool
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood (nats, float32, 0 where masked) and mask of each target, [B, T].

    `isolated` documents do not see each other and each starts at position 0. Inside, a row lies in
    the order that its devices balance best; positions and segments go with their tokens.
    """
    inputs_BT, targets_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    mask_BT = batch["loss_mask"][:, 1:]
    T = inputs_BT.shape[1]
    if isolated:
        positions_BT, segments_BT = batch["positions"][:, :-1], batch["segments"][:, :-1]
    else:
        positions_BT, segments_BT = jnp.broadcast_to(jnp.arange(T), inputs_BT.shape), None
    inputs_BT, targets_BT, positions_BT, segments_BT = jax.tree.map(
        lambda x_BT: sharding.balance(x_BT, compute.context),
        (inputs_BT, targets_BT, positions_BT, segments_BT),
    )
    x_BTD = llama(inputs_BT, positions_BT, segments_BT, compute=compute)
    nll_BT = chunked_cross_entropy(llama, x_BTD, targets_BT, chunk, compute.context)
    nll_BT = sharding.unbalance(nll_BT, compute.context)
    return jnp.where(mask_BT, nll_BT, 0.0), mask_BT


def chunked_cross_entropy(
    llama: Llama, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int, context: int = 1
) -> jax.Array:
    """-log softmax(logits)[target] in float32, [B, T], holding the float32 logits of `chunk`
    positions at once. Each of `context` devices takes a chunk's share from its own part of the row.
    """
    B, T, D = x_BTD.shape
    part = T // context
    chunk = min(max(1, chunk // context), part)
    whole = part // chunk * chunk
    w_DV = llama.output_weight().astype(x_BTD.dtype)

    def parts(x):  # [B, T, ...] -> [B, context, T / context, ...]
        return x.reshape(B, context, part, *x.shape[2:])

    def chunks(x):  # [B, context, whole, ...] -> [P, B, context * chunk, ...]
        x = x.reshape(B, context, -1, chunk, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0).reshape(-1, B, context * chunk, *x.shape[4:])

    x, targets = parts(x_BTD), parts(targets_BT)
    nll = cross_entropy(chunks(x[:, :, :whole]), w_DV, chunks(targets[:, :, :whole]))
    nll = jnp.moveaxis(nll.reshape(-1, B, context, chunk), 0, 2).reshape(B, context, whole)
    if whole < part:
        x, targets = x[:, :, whole:].reshape(1, B, -1, D), targets[:, :, whole:].reshape(1, B, -1)
        rest = cross_entropy(x, w_DV, targets)
        nll = jnp.concatenate([nll, rest.reshape(B, context, -1)], axis=2)
    return nll.reshape(B, T)


@jax.custom_vjp
def cross_entropy(x_PBCD: jax.Array, w_DV: jax.Array, targets_PBC: jax.Array) -> jax.Array:
    """-log softmax(x w)[target], float32 [P, B, C]; the P chunks of a row one after another.

    What is kept for the backward pass is the gradient of the logits, softmax - one-hot, rounded to
    the dtype of x as its products take it. The gradient of w has the dtype of w.
    """
    return _cross_entropy(x_PBCD, w_DV, targets_PBC)[0]


def _cross_entropy(x_PBCD, w_DV, targets_PBC):
    w_DV = sharding.constrain(w_DV, None, "vocab")  # gathered once, not for each chunk

    def chunk(_, x_and_targets):
        x_BCD, targets_BC = x_and_targets
        x_BCD = sharding.constrain(x_BCD, "batch", "queries", None)
        logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, w_DV, preferred_element_type=jnp.float32)
        logits_BCV = sharding.constrain(logits_BCV, "batch", "queries", "vocab")
        is_target_BCV = targets_BC[..., None] == jnp.arange(w_DV.shape[1])[None, None]
        total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        nll_BC = total_BC - jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
        grad_BCV = jnp.exp(logits_BCV - total_BC[..., None]) - is_target_BCV
        return None, (nll_BC, grad_BCV.astype(x_BCD.dtype))

    _, (nll_PBC, grad_PBCV) = jax.lax.scan(chunk, None, (x_PBCD, targets_PBC))
    return nll_PBC, (x_PBCD, w_DV, grad_PBCV)


def _cross_entropy_back(kept, grad_PBC):
    x_PBCD, w_DV, grad_PBCV = kept
    grad_PBCV = grad_PBCV * grad_PBC[..., None].astype(grad_PBCV.dtype)  # 0 or 1 in training
    x_grad_PBCD = jnp.einsum("PBCV,DV->PBCD", grad_PBCV, w_DV)
    w_grad_DV = jnp.einsum("PBCD,PBCV->DV", x_PBCD, grad_PBCV)
    w_grad_DV = sharding.constrain(w_grad_DV, "embed", "vocab")
    # left to itself the compiler sums the gradient of w behind those of all layers, and keeps its
    # unsplit whole until then
    x_grad_PBCD, w_grad_DV = jax.lax.optimization_barrier((x_grad_PBCD, w_grad_DV))
    return x_grad_PBCD, w_grad_DV, None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_back)
