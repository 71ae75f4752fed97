r"""The whole path of Code Llama on a laptop's CPU, in minutes: the paper's stages, a nano model.

    code (infilling) --> long_context --> instruct
                    \--> python --> python_long_context

    python recipes/nano.py                             what `make demo` runs
    python recipes/nano.py --code-dir ~/src/project    your own code, in any language
    python recipes/nano.py --list                      every stage on one line

The corpus is what every Python machine has: the standard library. Run again after an interruption,
it goes on where it was. The end is WORKDIR/report.md: what the model learned, and what it did not.
"""

import functools
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed

from codellama_jax import launch, malloc
from codellama_jax.config import Data, Layout, Model, Optim, Stage, check

SEQ_LEN = 256  # Llama 2: 4,096
BATCH = 512  # tokens; the paper: 4M. With so few tokens, many small steps learn the most
VOCAB_SIZE = 1_024  # with the four infilling pieces; Code Llama: 32,016
# Table 1. Code comes in two forms: functions, which fit a short row whole and are infilled, and
# files, which only long rows hold: cut to short rows, they make every loss worse.
CODE_MIX = {"code": 0.85, "code_language": 0.08, "language": 0.07}
PYTHON_MIX = {"python": 0.75, "code": 0.10, "code_language": 0.10, "language": 0.05}
FILES = {"code": "code_files", "python": "python_files"}
TOKENIZER_TEXTS = ["code", "code_language", "language"]
FUNCTION_CHARS = 400  # longest function-sized document: most fit a row whole
HELDOUT_RATE = 0.04  # share of files held out
LAYOUT = Layout(
    microbatches=1,
    compute_dtype="float32",  # bfloat16 is slower on CPUs
    remat="none",
    scan_layers=False,
)


def stages(vocab_size: int = VOCAB_SIZE) -> dict[str, Stage]:
    """Both branches of the paper's figure 2, scaled in length only."""
    model = Model(
        dim=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=384,
        vocab_size=vocab_size,
        rope_theta=1e4,
        max_seq_len=SEQ_LEN,
        norm_eps=1e-5,
    )
    code = Stage(
        name="code",
        start_from=None,  # the paper starts from Llama 2
        model=model,
        data=Data(
            mix=CODE_MIX,
            seq_len=SEQ_LEN,
            batch_tokens=BATCH,
            infilling_rate=0.9,  # sec. 2.3
            line_rate=0.7,  # ours: whole lines are what a model this small can learn to fill in
        ),
        optim=Optim(
            peak_lr=2e-3,  # ours: a small model bears more than the paper's 3e-4
            warmup_steps=200,  # sec. 2.2: 1,000
            final_lr_ratio=1 / 30,  # sec. 2.2
            beta1=0.9,  # sec. 2.2
            beta2=0.95,  # sec. 2.2
            eps=1e-5,  # Llama 2
            weight_decay=0.1,  # Llama 2
            clip_norm=1.0,  # Llama 2
        ),
        steps=6_144,
        layout=LAYOUT,
        log_every=100,
        eval_every=1_000_000,  # before and after the stage is enough here
        eval_rows=64,
        save_every=1_000,
    )
    python = replace(
        code,
        name="python",
        start_from="code",
        data=replace(code.data, mix=PYTHON_MIX, infilling_rate=0.0, line_rate=0.0),
        optim=replace(code.optim, peak_lr=5e-4, warmup_steps=50),  # sec. 2.6: less than code's
        steps=320,
    )
    long_context = lengthened(code, "long_context", steps=1_280, peak_lr=4e-3)
    python_long_context = lengthened(python, "python_long_context", steps=128, peak_lr=1.5e-3)
    instruct = replace(
        long_context,
        name="instruct",
        start_from="long_context",
        data=replace(
            code.data,
            mix={"dialogues": 0.92, "code": 0.06, "language": 0.02},  # sec. 2.5: 6% and 2%
        ),
        optim=replace(code.optim, peak_lr=1e-3, warmup_steps=50),  # ours
        steps=512,
    )
    made = (code, python, long_context, python_long_context, instruct)
    return {stage.name: stage for stage in made}


def lengthened(before: Stage, name: str, *, steps: int, peak_lr: float) -> Stage:
    """Long context (sec. 2.4): files whole, rows of 4 times the length, RoPE base 1e4 -> 1e6.

    The paper's model has learned to look back before, and needs few tokens at a low rate. Ours has
    not: only at a high rate do its heads begin to copy what followed the same text earlier.
    """
    mix = {FILES.get(corpus, corpus): share for corpus, share in before.data.mix.items()}
    return replace(
        before,
        name=name,
        start_from=before.name,
        model=replace(before.model, rope_theta=1e6, max_seq_len=4 * SEQ_LEN),
        data=replace(before.data, mix=mix, seq_len=4 * SEQ_LEN, batch_tokens=4 * SEQ_LEN),
        optim=replace(before.optim, peak_lr=peak_lr, warmup_steps=20),
        steps=steps,
    )


# -- the program ---------------------------------------------------------------------------------
def main() -> None:
    args = arguments()
    with launch.refusals(args.traceback):
        if args.list:
            launch.show("nano", launch.changed(stages(), args.set))
            return
        check_arguments(args)
        began = time.monotonic()
        use_cpu()
        malloc.keep_freed()  # to give it back takes a quarter of the time of a step
        workdir = Path(args.workdir)
        launch.make_folder(workdir)
        launch.keep_compiled(workdir)
        tokenizer = prepare(workdir, args.code_dir, args.tokenizer)
        plan = launch.changed(wanted(stages(tokenizer.vocab_size), args.stage), args.set)
        chosen = list(plan.values())
        print(forecast(chosen), flush=True)
        from codellama_jax import goodput, train

        preparing = time.monotonic() - began
        for stage in chosen:
            train.train(stage, workdir)
        if not args.stage:
            training = goodput.seconds(workdir, list(plan))  # in earlier calls, too
            finish(plan, workdir, tokenizer, preparing + training)


def check_arguments(args) -> None:
    """Refuses what is mistyped before anything is made."""
    for folder in args.code_dir:
        check(
            Path(folder).exists(),
            f"{folder} is missing; name a directory of source files, or a .jsonl or .parquet file",
        )
    plan = launch.changed(wanted(stages(), args.stage), args.set)
    if args.tokenizer and any(stage.data.infilling_rate for stage in plan.values()):
        from codellama_jax import tokenizer

        check(
            tokenizer.Tokenizer(args.tokenizer).middle_id is not None,
            f"{args.tokenizer} has no infilling pieces; use Code Llama's, or train without them: "
            "--set data.infilling_rate=0 --set data.line_rate=0",
        )


def wanted(plan: dict[str, Stage], name: str | None) -> dict[str, Stage]:
    """All stages, or the one that --stage names."""
    return {name: launch.pick(plan, name, "nano")} if name else plan


def arguments():
    parser = launch.parser(__doc__)
    parser.set_defaults(workdir="runs/nano")
    parser.add_argument(
        "--code-dir",
        action="append",
        default=[],
        metavar="PATH",
        help="train on this tree of source files, or .jsonl or .parquet file of texts, instead of "
        "Python's library; may be repeated",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.model, such as Meta's, instead of our own"
    )
    return parser.parse_args()


def use_cpu() -> None:
    """One device for all cores. (Several on few cores wait for each other, at worst for ever.)"""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)


def prepare(workdir: Path, code_dirs: list[str], tokenizer_file: str | None):
    """The tokenizer and the corpus of the run; made once, then found."""
    from codellama_jax import tokenizer, whole
    from codellama_jax.data import pipeline, sources
    from codellama_jax.data.inputs import Input
    from codellama_jax.tokenizer import training

    library = (Input(sources.THIS_PYTHON),)
    given = tuple(Input(folder) for folder in code_dirs)
    request = pipeline.Request(
        inputs=given or library,
        fill=library if given else (),
        function_chars=FUNCTION_CHARS,
        heldout_rate=HELDOUT_RATE,
    )
    path, folder = workdir / "tokenizer.model", workdir / "corpus"
    theirs = tokenizer.Tokenizer(tokenizer_file) if tokenizer_file else None
    if not (folder / "manifest.json").exists():
        print("Reading and cleaning the corpus (about 15 s)", flush=True)
        if theirs is None and not path.exists():
            texts = pipeline.training_texts(folder, request, TOKENIZER_TEXTS)
            training.train(texts, VOCAB_SIZE, path)
    if theirs is not None:
        if path.exists():
            check(
                tokenizer.Tokenizer(path).fingerprint == theirs.fingerprint,
                f"{workdir} was made with another tokenizer than {tokenizer_file}; "
                "use another --workdir",
            )
        whole.write(path, Path(theirs.path).read_bytes())
    made = tokenizer.Tokenizer(path)
    prepared = pipeline.prepare(folder, made, request)
    say_what_is_in(prepared.manifest, folder, made.vocab_size)
    return made


def say_what_is_in(manifest: dict, folder: Path, vocab_size: int) -> None:
    """Of the corpus: its sizes, what Python's library had to fill in, and what was left out."""
    from codellama_jax.data import sources

    corpora = manifest["corpora"].items()
    counts = [f"{name} {entry['train']['tokens'] / 1e6:.1f} M" for name, entry in corpora]
    print(f"Corpus of {vocab_size:,} pieces, in tokens: {', '.join(counts)}", flush=True)
    filled = [name for name, entry in corpora if entry["origin"] == sources.THIS_PYTHON]
    if filled and manifest["settings"]["fill"]:
        print(f"From Python's library, for want of your own: {', '.join(filled)}", flush=True)
    left = [f"{of['documents']:,} {why}" for why, of in manifest["removed"].items()]
    if left:
        print(f"Left out: {', '.join(left)}; see {folder / 'removed'}", flush=True)


def forecast(plan: list[Stage]) -> str:
    """How long the run will take, from how fast this machine multiplies matrices now."""
    import numpy as np

    a = np.ones((1_024, 1_024), np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    flops = 2 * 1_024**3 / min(times[1:])
    seconds = sum(
        stage.tokens * stage.model.flops_per_token(stage.data.seq_len) / (TRAINING_SHARE * flops)
        + SECONDS_PER_STAGE
        for stage in plan
    )
    tokens = sum(stage.tokens for stage in plan)
    return (
        f"{len(plan)} stages, {tokens / 1e6:.1f} million tokens: about {seconds / 60:.0f} minutes "
        f"on cores that reach {flops / 1e9:.0f} GFLOP/s, less what an earlier run has done"
    )


TRAINING_SHARE = 0.27  # of the speed of a large matrix product, that training reaches: measured
SECONDS_PER_STAGE = 25  # compiling, held-out losses, checkpoints, and a share of the judging


FINISHED = "long_context"  # sec. 2.4: the paper's Code Llama is the one after long context
LINES = 600  # held-out lines to infill
MAX_NEW_TOKENS = 48
PROMPT = "def read_json(path):\n"
QUESTION = "Write a function `close` that closes the file."


def finish(plan: dict[str, Stage], workdir: Path, tokenizer, seconds: float) -> None:
    """Judges the weights, exports them, and writes the report; all before took `seconds`."""
    from codellama_jax import checkpoint, generate, report
    from codellama_jax.report import results

    began = time.monotonic()
    params = {name: checkpoint.restore_params(workdir / name, plan[name].model) for name in plan}
    llama, answering = (
        generate.CodeLlama(plan[name].model, params[name], tokenizer)
        for name in (FINISHED, "instruct")
    )
    skipped: dict[str, str] = {}

    def attempt(part: str, judge):
        """A tree of one's own may have nothing to judge by; then the report says so."""
        try:
            return judge(plan, params, workdir / "corpus", tokenizer)
        except ValueError as error:
            skipped[part] = str(error)

    print("Judging: loss by position", flush=True)
    long_context = attempt("long_context", judge_long_context)
    print(f"Judging: {LINES} held-out lines infilled, in both orders", flush=True)
    infilled = attempt("infilling", functools.partial(judge_infilling, llama))
    print("Judging: a completion and an answer", flush=True)
    completion = llama.complete(PROMPT, max_new_tokens=96, temperature=0.0)
    question = [{"role": "user", "content": QUESTION}]
    answer = answering.chat(question, max_new_tokens=96, temperature=0.0)
    print("Exporting to Hugging Face format, and reading it back", flush=True)
    exports = [
        export(plan[name], params[name], workdir, tokenizer)
        for name in ("long_context", "python_long_context", "instruct")
    ]
    run = results.Results(
        title="A nano Code Llama",
        command=" ".join(["python recipes/nano.py", *sys.argv[1:]]),
        workdir=str(workdir),
        stages=list(plan.values()),
        seconds=seconds + time.monotonic() - began,
        long_context=long_context,
        infilling=infilled,
        completion=results.Sample(FINISHED, PROMPT, completion),
        chat=results.Sample("instruct", QUESTION, answer),
        exports=exports,
        skipped=skipped,
    )
    report.show(run, report.write(run, workdir))


def judge_long_context(plan, params, corpus_dir: Path, tokenizer):
    """Loss by position before and after long context, on the same held-out files (fig. 4a)."""
    from codellama_jax import sharding
    from codellama_jax.evals import heldout
    from codellama_jax.report import results

    curves = [
        heldout.by_position(
            plan[name].model,
            params[name],
            corpus_dir,
            tokenizer,
            sharding.make_mesh(plan[name].layout),
            length=4 * SEQ_LEN,
            layout=plan[name].layout,
            old_length=SEQ_LEN,
        )
        for name in ("code", "long_context")
    ]
    return results.LongContext("code", "long_context", *curves)


def judge_infilling(llama, plan, params, corpus_dir: Path, tokenizer):
    """Held-out lines: how well they are expected in every form, and how many are written right."""
    from codellama_jax import sharding
    from codellama_jax.evals import infilling
    from codellama_jax.report import results

    stage = plan[FINISHED]
    problems = infilling.problems(
        corpus_dir, tokenizer, count=LINES, max_tokens=SEQ_LEN - MAX_NEW_TOKENS, seed=0
    )
    mesh = sharding.make_mesh(stage.layout)
    middles = infilling.bits_per_byte(
        stage.model, params[FINISHED], tokenizer, problems, layout=stage.layout, mesh=mesh
    )
    psm, spm = (
        infilling.exact_match(llama, problems, suffix_first, MAX_NEW_TOKENS)
        for suffix_first in (False, True)
    )
    return results.Infilling(FINISHED, problems, middles, psm, spm)


def export(stage: Stage, params, workdir: Path, tokenizer):
    """Writes <workdir>/export/<stage>, loads it, and compares logits on a fixed row of tokens."""
    import shutil

    import numpy as np

    from codellama_jax import convert, generate
    from codellama_jax.report import results

    folder = workdir / "export" / stage.name
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run; made anew from the checkpoint
    convert.export_hf(params, stage.model, folder, workdir / "tokenizer.model")
    tokens = np.arange(stage.data.seq_len)[None] % stage.model.vocab_size
    ours = generate.CodeLlama(stage.model, params, tokenizer).logits(tokens)
    theirs = generate.load(folder).logits(tokens)
    return results.Export(stage.name, str(folder), float(np.abs(ours - theirs).max()))


if __name__ == "__main__":
    main()
