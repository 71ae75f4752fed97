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
import gzip
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from codellama_jax import compiler_options, config, launch
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
    where: str
    rows: float  # a chip
    length: int
    theirs: str  # MaxText's remat_policy
    layout: config.Layout
    context: int = 1  # MaxText's context parallelism

    def stage(self) -> config.Stage:
        stage = code_llama.stages(self.size)["code"]
        rows = round(self.rows * chips.Slice.parse(self.where).chips)
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
            "compile_topology": TOPOLOGY[self.where],
            "compile_topology_num_slices": 1,
            "per_device_batch_size": self.rows,
            "max_target_length": self.length,
            "remat_policy": self.theirs,
            "ici_context_parallelism": self.context,
            "attention": "flash",
            "dataset_type": "synthetic",
            "enable_checkpointing": False,
            **({"allow_split_physical_axes": True} if self.context > 1 else {}),
            **widths,
        }
        return [f"{name}={value}" for name, value in named.items()]


Layout = config.Layout
# fmt: off
CELLS = {  # remat of MaxText, and ours, which keeps the same
    "7b-v5e": Cell("7b", "v5e:16x16", 1, 4_096, "full", Layout()),
    "7b-v5p": Cell("7b", "v5p:4x4x4", 4, 4_096, "minimal", Layout(remat="products")),
    "7b-v5p-dots": Cell(
        "7b", "v5p:4x4x4", 4, 4_096, "minimal_with_context", Layout(remat="dots")
    ),
    "7b-v5e-long": Cell("7b", "v5e:16x16", 0.5, 16_384, "full", Layout(context=2), context=2),
    "34b-v5e": Cell("34b", "v5e:16x16", 1, 4_096, "full", Layout()),
    "70b-v5p": Cell("70b", "v5p:4x4x8", 1, 4_096, "minimal_with_context", Layout(remat="dots")),
    "70b-v6e": Cell("70b", "v6e:16x16", 2, 4_096, "full", Layout()),
}
# fmt: on


def main() -> None:
    args = arguments()
    with launch.refusals():
        if args.child:
            compile_theirs(Path(args.child[0]), args.child[1:])
            return
        for name in args.cell or CELLS:
            rows = [measured(name, CELLS[name], who, args.plain) for who in ("MaxText", "here")]
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
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(name: str, cell: Cell, who: str, plain: bool) -> dict:
    """What a step needs, by who made it, with our compiler options or with none."""
    stage, where = cell.stage(), chips.Slice.parse(cell.where)
    told = {} if plain else compiler_options.of_chip(where.chip.name, stage.model.dim)
    if who == "here":
        facts = program.compiled(program.canonical(stage), where, told, store.folder())
    else:
        facts = compiled_theirs(cell, where, told)
    config.check("memory" in facts, f"{name} of {who} does not fit: {facts}")
    return row(name, cell, who, not plain, facts)


def compiled_theirs(cell: Cell, where: chips.Slice, told: dict) -> program.Report:
    """program.compiled of MaxText's step: compiled in a process of its own, which it configures."""
    settings = cell.settings() + [f"compile_xla_flags={' '.join(as_flags(told))}"] * bool(told)
    versions = store.versions() | {"maxtext": metadata.version("maxtext")}
    path = store.folder() / f"{store.digest([settings, versions])}.json"
    if store.load(path) is None:
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ran = subprocess.run([sys.executable, __file__, "--child", path, *settings], **quiet)
        config.check(path.exists(), f"MaxText failed:\n{ran.stdout[-3_000:]}")
    facts = store.load(path)
    if "memory" not in facts:  # it does not fit
        return facts
    text = gzip.decompress(path.with_suffix(".hlo.gz").read_bytes()).decode()
    return facts | {"regions": estimate.regions(text, facts, where)}


def as_flags(told: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in told.items()]


def compile_theirs(path: Path, settings: list[str]) -> None:
    """Lets MaxText make its step, and compiles that as ours is. Writes the facts to `path`."""
    chips.Slice.parse("v5e:2x2").topology()  # says in the environment how libtpu is to be loaded
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    import jax
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    def compile_here(func, args, kwargs, mesh, came, goes, static, donated, settings, axis_rules):
        with jax.set_mesh(mesh), axis_rules:
            step = jax.jit(
                func,
                in_shardings=came,
                out_shardings=goes,
                static_argnums=static,
                donate_argnums=donated,
            )
            lowered = step.lower(*args, **kwargs)
        flags = settings.compile_xla_flags.split()
        told = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
        facts, text = program.compile_now(lowered, mesh, told)
        store.save(path.with_suffix(".hlo.gz"), gzip.compress(text.encode()))
        store.save(path, facts)
        sys.exit()

    train_compile.jit_and_compile = compile_here
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main(["train_compile", str(base), *settings])


def row(name: str, cell: Cell, who: str, options: bool, facts: program.Report) -> dict:
    stage, where = cell.stage(), chips.Slice.parse(cell.where)
    time = estimate.step_time(stage, where, facts)
    moved = {
        kind: sum(each["gigabytes"] for each in time["collectives"] if each["kind"] in kinds)
        for kind, kinds in (
            ("gathered", ("all-gather",)),
            ("reduced", ("all-reduce", "reduce-scatter")),
        )
    }
    cycles = sum(region["cycles"] * region["times"] for region in facts["regions"])
    parts = ("compute", "kernels", "exposed", "step")
    return {
        **{"cell": name, "size": cell.size, "who": who, "options": options},
        **{"slice": cell.where, "rows": cell.rows, "seq_len": cell.length, "mesh": facts["mesh"]},
        "remat": cell.theirs if who == "MaxText" else cell.layout.remat,
        **{
            f"{part}_gb": facts["memory"][part] / 1e9
            for part in ("arguments", "temporaries", "peak")
        },
        "gcycles": cycles / 1e9,
        **{f"{kind}_gb": gigabytes for kind, gigabytes in moved.items()},
        **{f"{part}_seconds": time[f"{part}_seconds"] for part in parts},
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
