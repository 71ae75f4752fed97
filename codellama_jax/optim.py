"""AdamW under a warm-up and a cosine, as the paper trains (section 2.2)."""

import jax
import jax.numpy as jnp
import optax

from codellama_jax import config


def learning_rate(optim: config.Optim, steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine that reaches peak * final_lr_ratio at `steps`.

    lr(s) = peak * s / warmup                                              for s < warmup
    lr(s) = peak * (r + (1 - r) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2)   afterwards
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if optim.warmup_steps else optim.peak_lr,
        peak_value=optim.peak_lr,
        warmup_steps=optim.warmup_steps,
        decay_steps=steps,
        end_value=optim.peak_lr * optim.final_lr_ratio,
    )


def adamw(optim: config.Optim, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; matrices decay, norms do not.

    The first step uses lr(1): a step at learning rate 0 would move nothing.
    """
    schedule = learning_rate(optim, steps)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decays),
        optax.scale_by_learning_rate(lambda count: schedule(count + 1)),
    )


def decays(params) -> dict:
    """True for each weight that decays: all but the RMSNorm weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1].key).endswith("norm"), params
    )


def global_norm(tree) -> jax.Array:
    """sqrt of the sum of squares of all entries, float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))
