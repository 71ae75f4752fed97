r"""MaxText's training step beside ours: same model, slice, rows, compiler; needs no TPU.

    python3.12 -m venv beside && beside/bin/pip install 'maxtext[tpu]==0.2.5' .
    beside/bin/python tools/bench_maxtext.py                     every cell, 5 to 10 minutes each
    beside/bin/python tools/bench_maxtext.py --cell 7b-v5e       one
    beside/bin/python tools/bench_maxtext.py --plain             without our compiler options
    beside/bin/python tools/bench_maxtext.py --record            into docs/pods.md, as it goes

Both steps get the same compiler options, and one reader counts all of it (codellama_jax/plan):
attention, which has no cycles, by one table for blocks of both sizes. MaxText splits weights over
all devices, so ours does here, too. What was compiled is kept, as by tools/plan_pod.py.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from codellama_jax import compiler_options, config, launch
from codellama_jax.config import Layout
from codellama_jax.plan import chips, estimate, ledger, program, store
from recipes import code_llama

DOCS = Path(__file__).parents[1] / "docs"
VOCABULARY = 32_000  # of the models that MaxText has
# fmt: off
WIDTHS_34B = {  # MaxText has no such model; vocabulary and the rest are its llama2's
    "override_model_config": True, "base_emb_dim": 8_192, "base_num_query_heads": 64,
    "base_num_kv_heads": 8, "head_dim": 128, "base_mlp_dim": 22_016, "base_num_decoder_layers": 48,
}
# fmt: on
TOPOLOGY = {  # slices as MaxText names them
    "v5e:16x16": "v5e-256",
    "v5p:4x4x4": "v5p-128",
    "v5p:4x4x8": "v5p-256",
    "v6e:16x16": "v6e-256",
}


@dataclass(frozen=True)
class Cell:
    """One step of one microbatch, and how each side lays it out."""

    size: str
    where: chips.Slice
    rows: float  # a chip
    length: int
    theirs: str  # MaxText's remat_policy
    layout: Layout

    def stage(self) -> config.Stage:
        stage = code_llama.stages(self.size)["code"]
        rows = round(self.rows * self.where.chips)
        return replace(
            stage,
            model=replace(stage.model, vocab_size=VOCABULARY, max_seq_len=self.length),
            data=replace(stage.data, seq_len=self.length, batch_tokens=rows * self.length),
            layout=self.layout,
        )

    def settings(self) -> list[str]:
        """The cell as MaxText is told of it."""
        widths = WIDTHS_34B if self.size == "34b" else {}
        named = {
            "model_name": f"llama2-{'7b' if widths else self.size}",
            "compile_topology": TOPOLOGY[str(self.where)],
            "compile_topology_num_slices": 1,
            "per_device_batch_size": self.rows,
            "max_target_length": self.length,
            "remat_policy": self.theirs,
            "ici_context_parallelism": self.layout.context,
            "attention": "flash",
            "dataset_type": "synthetic",
            "enable_checkpointing": False,
            **({"allow_split_physical_axes": True} if self.layout.context > 1 else {}),
            **widths,
        }
        return [f"{name}={value}" for name, value in named.items()]


V5E, V6E = chips.Slice.parse("v5e:16x16"), chips.Slice.parse("v6e:16x16")
CUBE, TWO_CUBES = chips.Slice.parse("v5p:4x4x4"), chips.Slice.parse("v5p:4x4x8")
# fmt: off
CELLS = {  # remat of MaxText, and ours, which keeps the same
    "7b-v5e": Cell("7b", V5E, 1, 4_096, "full", Layout()),
    "7b-v5p": Cell("7b", CUBE, 4, 4_096, "minimal", Layout(remat="products")),
    "7b-v5p-dots": Cell("7b", CUBE, 4, 4_096, "minimal_with_context", Layout(remat="dots")),
    "7b-v5e-long": Cell("7b", V5E, 0.5, 16_384, "full", Layout(context=2)),
    "34b-v5e": Cell("34b", V5E, 1, 4_096, "full", Layout()),
    "70b-v5p": Cell("70b", TWO_CUBES, 1, 4_096, "minimal_with_context", Layout(remat="dots")),
    "70b-v6e": Cell("70b", V6E, 2, 4_096, "full", Layout()),
}
# fmt: on
MEMORY = ("arguments", "temporaries", "peak")
TIME = ("compute", "kernels", "exposed", "step")


def main() -> None:
    args = arguments()
    with launch.refusals():
        if args.lower:
            theirs(args.lower, args.plain).answer(store.folder())
            return
        for name in args.cell or CELLS:
            compile_theirs(name, args.plain)
            rows = [measured(name, who, args.plain) for who in ("MaxText", "here")]
            print(table(rows), flush=True)
            if args.record:
                record(rows)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", action="append", choices=tuple(CELLS))
    parser.add_argument("--plain", action="store_true", help="without our compiler options")
    parser.add_argument("--record", action="store_true", help="into the table of docs/pods.md")
    parser.add_argument("--lower", choices=tuple(CELLS), help=argparse.SUPPRESS)
    return parser.parse_args()


def compile_theirs(name: str, plain: bool) -> None:
    """Compiles MaxText's step, if it was not, in a process of its own: it configures JAX."""
    if theirs(name, plain).is_answered(store.folder()):
        return
    command = [sys.executable, __file__, "--lower", name, *["--plain"] * plain]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    config.check(ran.returncode == 0, f"MaxText failed:\n{ran.stdout[-3_000:]}")


def theirs(name: str, plain: bool) -> program.Question:
    """What MaxText's step needs."""
    cell = CELLS[name]
    leads = [cell.settings(), metadata.version("maxtext"), told(cell, plain)]
    return program.Question(
        leads, cell.where, told(cell, plain), (), lambda: lower_theirs(cell.settings())
    )


def ours(name: str, plain: bool) -> program.Question:
    cell = CELLS[name]
    return program.question(program.canonical(cell.stage()), cell.where, told(cell, plain))


def told(cell: Cell, plain: bool) -> dict:
    """What the compiler is told, for both."""
    chip = cell.where.chip.name
    return {} if plain else compiler_options.of_chip(chip, cell.stage().model.dim)


def lower_theirs(settings: list[str]):
    """MaxText's own step as its own tool makes it, lowered, and its mesh."""
    chips.Slice.parse("v5e:2x2").topology()  # says in the environment how libtpu is to be loaded
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    import jax
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    made = []

    class Lowered(Exception):
        pass

    def lower(func, args, kwargs, mesh, came, goes, static, donated, _, axis_rules):
        step = jax.jit(
            func,
            in_shardings=came,
            out_shardings=goes,
            static_argnums=static,
            donate_argnums=donated,
        )
        with jax.set_mesh(mesh), axis_rules, program.without_places():
            made.append((step.lower(*args, **kwargs), mesh))
        raise Lowered

    train_compile.jit_and_compile = lower
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    with contextlib.suppress(Lowered):
        train_compile.main(["train_compile", str(base), *settings])
    return made[0]


def measured(name: str, who: str, plain: bool) -> dict:
    """What a step needs, by who made it."""
    cell = CELLS[name]
    question = theirs(name, plain) if who == "MaxText" else ours(name, plain)
    facts, text = question.answer(store.folder())
    config.check("memory" in facts, f"{name} of {who} does not fit: {facts}")
    facts |= {"regions": estimate.regions(text, facts, cell.where)}
    time = estimate.step_time(cell.stage(), cell.where, facts)
    cycles = sum(region["cycles"] * region["times"] for region in facts["regions"])
    return {
        **{"cell": name, "size": cell.size, "who": who, "options": not plain},
        **{"slice": str(cell.where), "rows": cell.rows, "seq_len": cell.length},
        **{"mesh": facts["mesh"], "remat": cell.theirs if who == "MaxText" else cell.layout.remat},
        **{f"{part}_gb": facts["memory"][part] / 1e9 for part in MEMORY},
        "gcycles": cycles / 1e9,
        "gathered_gb": ledger.of_kinds(time, "all-gather"),
        "reduced_gb": ledger.of_kinds(time, "all-reduce", "reduce-scatter"),
        **{f"{part}_seconds": time[f"{part}_seconds"] for part in TIME},
        **{name: facts["compiled"][name] for name in ledger.VERSIONS},
    }


# -- for people ----------------------------------------------------------------------------------
FILE = "pods_maxtext.json"
SHOWN = {  # column: how it is written
    "arguments_gb": ".2f", "temporaries_gb": ".2f", "peak_gb": ".2f", "gcycles": ".2f",
    "gathered_gb": ".1f", "reduced_gb": ".1f", "kernels_seconds": ".3f", "exposed_seconds": ".3f",
    "step_seconds": ".3f",
}  # fmt: skip
COLUMNS = (
    *("cell", "options", "whose", "mesh", "remat", "arguments GB", "temporaries GB", "peak GB"),
    *("G cycles", "gathered GB", "reduced GB", "attention s", "exposed s", "step s"),
)


def table(rows: list[dict]) -> str:
    """Markdown: MaxText, here, and the second by the first, for each cell and set of options."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        for each in (theirs, ours):
            told = "ours" if each["options"] else "none"
            mesh = " x ".join(f"{axis} {ways}" for axis, ways in each["mesh"].items())
            head = (described(each), told, each["who"], mesh, f"`{each['remat']}`")
            lines.append(line(*head, *(format(each[name], how) for name, how in SHOWN.items())))
        ratios = (f"{ours[name] / theirs[name]:.2f}" if theirs[name] else "" for name in SHOWN)
        lines.append(line("", "", "here / MaxText", "", "", *ratios))
    return "\n".join(lines)


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def described(each: dict) -> str:
    return f"{each['size']}, {each['slice']}, {each['rows']:g} x {each['seq_len']:,} a chip"


def record(new: list[dict]) -> None:
    """Puts the pair of a cell into docs/pods_maxtext.json and the table of docs/pods.md."""

    def key(each: dict) -> tuple:
        return list(CELLS).index(each["cell"]), not each["options"], each["who"] == "here"

    rows = [old for old in ledger.read(DOCS, FILE) if key(old) not in map(key, new)]
    rows = sorted([*rows, *new], key=key)
    ledger.write(DOCS, FILE, "maxtext", rows, table(rows))


if __name__ == "__main__":
    main()
