r"""Trains a few steps with compiler options and without, and compares what they compute.

    python tools/check_options.py                       on a TPU: the options it is compiled with
    python tools/check_options.py --layers 8 --rows 4   more of 7B's 32 layers, more rows a device
    python tools/check_options.py --dim 256 --length 512 --option xla_cpu_enable_fast_math=true

Two layers of 7B's widths unless told, random weights, one batch of random tokens in packed rows. It
prints loss and gradient norm of each step both ways, the largest difference of a weight after the
last, and seconds a step; it fails where losses differ by more than --tolerance of their size.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from codellama_jax import compiler_options, config, launch, optim, sharding, state, step
from recipes import code_llama


def main() -> None:
    args = arguments()
    with launch.refusals():
        device = jax.devices()[0]
        options = dict(parsed(pair) for pair in args.option)
        options = options or compiler_options.of_device(device.device_kind, args.dim)
        config.check(
            options, f"no options are set for {device.device_kind}: name some with --option"
        )
        stage = small(args)
        plain, told = trained(stage, {}, args.steps), trained(stage, options, args.steps)
        show(plain, told, options, device.device_kind)
        worst = max(abs(a - b) / abs(a) for a, b in zip(plain.losses, told.losses, strict=True))
        config.check(
            worst <= args.tolerance,
            f"losses differ by {worst:.1e} of their size, more than --tolerance {args.tolerance}",
        )


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--dim", type=int, default=4_096, help="width, a multiple of 128")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=4_096, help="of a row, in tokens")
    parser.add_argument("--rows", type=int, default=1, help="for each device")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    if odd := [pair for pair in args.option if "=" not in pair]:
        parser.error(f"--option {odd[0]}: write NAME=VALUE")
    if args.dim % 128 or min(args.dim, args.layers, args.length, args.rows, args.steps - 1) < 1:
        parser.error("--dim wants a multiple of 128, --steps 2 at least, the others 1")
    return args


def parsed(pair: str) -> tuple[str, str | bool]:
    name, value = pair.split("=", 1)
    return name, {"true": True, "false": False}.get(value.lower(), value)


def small(args) -> config.Stage:
    """The code stage of 7B in few layers, its rows over all devices, recomputed as on v5e."""
    stage = code_llama.stages("7b")["code"]
    layout = code_llama.layouts(stage, "7b")["v5e:16x16"]
    heads = args.dim // 128
    model = dataclasses.replace(
        stage.model, num_layers=args.layers, dim=args.dim, num_heads=heads, num_kv_heads=heads,
        ffn_dim=stage.model.ffn_dim * args.dim // stage.model.dim // 128 * 128,
        max_seq_len=args.length,
    )  # fmt: skip
    rows = args.rows * jax.device_count()
    return dataclasses.replace(
        stage,
        model=model,
        data=dataclasses.replace(stage.data, seq_len=args.length, batch_tokens=rows * args.length),
        optim=dataclasses.replace(stage.optim, warmup_steps=1),
        layout=dataclasses.replace(layout, data=1, fsdp=-1, microbatches=1),
        steps=args.steps,
    )


@dataclasses.dataclass
class Trained:
    losses: list[float]  # nats per token, by step
    norms: list[float]  # of the gradients, by step
    seconds: list[float]  # by step; the first compiles
    params: state.Params


def trained(stage: config.Stage, options: dict, steps: int) -> Trained:
    """So many steps on one batch, from the weights of seed 0."""
    mesh = sharding.make_mesh(stage.layout)
    tx = optim.adamw(stage.optim, stage.steps)
    train_state = state.random_state(stage.model, tx, mesh, seed=0)
    train_step = jax.jit(
        step.make_train_step(stage, jax.devices()[0].platform),
        donate_argnums=0,
        compiler_options=options,
    )
    batch, made = sharding.global_batch(random_batch(stage), mesh), Trained([], [], [], {})
    with jax.set_mesh(mesh):
        for _ in range(steps):
            began = time.perf_counter()
            try:
                train_state, values = train_step(train_state, batch)
            except jax.errors.JaxRuntimeError as error:
                said = str(error).splitlines()[0]
                raise ValueError(f"with {options or 'no options'} XLA says: {said}") from error
            made.losses.append(float(values["loss"]))
            made.norms.append(float(values["grad_norm"]))
            made.seconds.append(time.perf_counter() - began)
    made.params = jax.device_get(train_state.params)
    return made


def random_batch(stage: config.Stage) -> dict[str, np.ndarray]:
    """Random tokens in four documents a row, all of them targets."""
    rng = np.random.default_rng(0)
    rows, length = stage.data.rows_per_batch, stage.data.seq_len + 1
    segments = np.broadcast_to(np.arange(length) * 4 // length, (rows, length))
    starts = np.searchsorted(segments[0], segments[0])
    return {
        "tokens": rng.integers(3, stage.model.vocab_size, (rows, length), dtype=np.int32),
        "segments": segments.astype(np.int32),
        "positions": np.broadcast_to(np.arange(length) - starts, (rows, length)).astype(np.int32),
        "loss_mask": np.ones((rows, length), bool),
        "corpus": np.zeros(rows, np.int32),
    }


def show(plain: Trained, told: Trained, options: dict, kind: str) -> None:
    table = Table("step", "loss without", "with", "gradient norm without", "with")
    for i in range(len(plain.losses)):
        pairs = (plain.losses[i], told.losses[i], plain.norms[i], told.norms[i])
        table.add_row(str(i + 1), *(f"{value:.6f}" for value in pairs))
    differences = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(a))), plain.params, told.params
    )
    console = Console()
    console.print(" ".join(f"{name}={value}" for name, value in options.items()), f"on {kind}")
    console.print(table)
    console.print(
        "weights differ by at most "
        f"{max(jax.tree.leaves(differences)):.1e} of the largest of their kind; "
        f"{min(plain.seconds):.3f} s a step without, {min(told.seconds):.3f} with"
    )


if __name__ == "__main__":
    main()
