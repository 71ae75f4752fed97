"""The pure part of training: the loss, and one optimizer step.

The loss of a step is a sum over target tokens divided by their count, so it does not depend on the
mesh, on gradient accumulation, or on how documents were packed.
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
    grad_norm (before clipping), learning_rate.
    """
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

    `isolated` documents do not see each other and each starts at position 0.
    """
    inputs_BT, targets_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    mask_BT = batch["loss_mask"][:, 1:]
    T = inputs_BT.shape[1]
    if isolated:
        positions_BT, segments_BT = batch["positions"][:, :-1], batch["segments"][:, :-1]
    else:
        positions_BT, segments_BT = jnp.broadcast_to(jnp.arange(T), inputs_BT.shape), None
    x_BTD = llama(inputs_BT, positions_BT, segments_BT, compute=compute)
    nll_BT = chunked_cross_entropy(llama, x_BTD, targets_BT, chunk)
    return jnp.where(mask_BT, nll_BT, 0.0), mask_BT


def chunked_cross_entropy(
    llama: Llama, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """-log softmax(logits)[target] in float32, holding the logits of `chunk` positions at once.

    The backward pass computes each chunk's logits again.
    """
    B, T, D = x_BTD.shape

    def losses(x_BCD, targets_BC):
        logits_BCV = llama.logits(x_BCD)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BCV, targets_BC)

    if chunk >= T:
        return losses(x_BTD, targets_BT)
    whole = T // chunk * chunk

    def chunks(x):  # [B, T, ...] -> [T / chunk, B, chunk, ...]
        return jnp.moveaxis(x[:, :whole].reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    _, nll = jax.lax.scan(
        lambda _, part: (None, jax.checkpoint(losses)(*part)),
        None,
        (chunks(x_BTD), chunks(targets_BT)),
    )
    nll_BT = jnp.moveaxis(nll, 0, 1).reshape(B, whole)
    if whole < T:
        nll_BT = jnp.concatenate([nll_BT, losses(x_BTD[:, whole:], targets_BT[:, whole:])], axis=1)
    return nll_BT
