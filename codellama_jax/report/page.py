"""report.md: what a whole run earned, from its records and evals, with pictures and in words.

    write(run, folder)   report.md, report.json and three PNG files
    show(run)            the same in short, on the terminal

Held-out losses come from each stage's metrics.jsonl, where training wrote them; everything else is
in results.Results. What was not run is said to be so.
"""

import dataclasses
import json
from pathlib import Path

from codellama_jax import metrics, whole
from codellama_jax.evals.heldout import ByPosition
from codellama_jax.evals.infilling import Problem
from codellama_jax.report import plots, results, tables

CONTEXT_LINES = 8  # shown on each side of an infill
GENERATED_LINES = 6  # of an infill
ANSWER_LINES = 40  # of a completion or an answer


def write(run: results.Results, folder: str | Path) -> Path:
    """Writes the report and its pictures into `folder`; returns the path of report.md.

    Each file is written under a temporary name and renamed, report.md last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    history = read_history(run)
    plots.losses(run.stages, history, folder / "losses.png")
    if run.long_context:
        plots.by_position(_curves(run.long_context), folder / "by_position.png")
    if run.infilling:
        plots.infilling(run.infilling.middles, folder / "infilling.png")
    everything = dataclasses.asdict(run) | {"history": history}
    whole.write(folder / "report.json", json.dumps(everything, indent=1))
    path = folder / "report.md"
    whole.write(path, markdown(run, history))
    return path


def read_history(run: results.Results) -> dict[str, list[dict]]:
    """The lines of each stage's metrics.jsonl."""
    return {s.name: metrics.read(Path(run.workdir) / s.name) for s in run.stages}


# -- report.md -----------------------------------------------------------------------------------


def markdown(run: results.Results, history: dict[str, list[dict]]) -> str:
    """The text of report.md."""
    parts = [
        f"# {run.title}",
        _opening(run),
        "## Loss of every stage",
        "![Loss of every stage](losses.png)",
        _markdown(tables.stages(run.stages, history)),
        _note_on_stages(),
        "## Long context",
        *(_long_context(run.long_context) if run.long_context else _not_run(run, "long_context")),
        "## Infilling",
        *(_infilling(run) if run.infilling else _not_run(run, "infilling")),
        "## Completion",
        *(_sample(run.completion, "prompt") if run.completion else _not_run(run, "completion")),
        "## Chat",
        *(_sample(run.chat, "question") if run.chat else _not_run(run, "chat")),
        "## Where things lie",
        *_places(run),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(run: results.Results) -> str:
    model = run.stages[0].model
    took = f" The whole run took {_duration(run.seconds)}." if run.seconds else ""
    tokens = sum(stage.tokens for stage in run.stages)
    return (
        f"Made by `{run.command}`. The model has {model.num_params:,} parameters "
        f"({model.num_layers} layers of width {model.dim}, vocabulary {model.vocab_size:,}); all "
        f"stages together read {tokens / 1e6:,.1f} million tokens.{took}"
    )


def _note_on_stages() -> str:
    return (
        "Held-out loss in nats per token, on documents that no stage trains on, without infilling, "
        "before the stage's first step and after its last. Losses compare within a corpus and a "
        "row length, not between them. tokens/s is the median."
    )


def _long_context(result: results.LongContext) -> list[str]:
    note = (
        "Both read the same rows. A band is 1.96 standard errors of the curve's shape: how it "
        "goes, not how high it lies, which is a matter of the files."
    )
    return ["![Loss by position](by_position.png)", results.long_context_words(result), note]


def _curves(result: results.LongContext) -> dict[str, ByPosition]:
    return {
        f"{result.stage_before} (before)": result.before,
        f"{result.stage_after} (after)": result.after,
    }


def _infilling(run: results.Results) -> list[str]:
    infilling, middles = run.infilling, run.infilling.middles
    shown, how = results.examples(infilling)
    return [
        f"Single lines of held-out code, filled by `{infilling.stage}`: {middles.problems} lines "
        f"of {middles.documents} documents.",
        _infilling_words(run),
        "![Infilling](infilling.png)",
        _markdown(tables.matches(infilling)),
        _markdown(tables.bits(middles)),
        _markdown(tables.gains(middles)),
        f"{how} Generated in SPM, greedily.",
        *[block for number in shown for block in _infill(infilling, number)],
    ]


def _infilling_words(run: results.Results) -> str:
    name = run.infilling.stage
    model, tokens = run.stage(name).model, run.tokens_of(name)
    return results.infilling_words(run.infilling, model, tokens)


def _infill(infilling: results.Infilling, number: int) -> list[str]:
    problem = infilling.problems[number]
    return [f"`{problem.path}`", _fenced(infill_text(problem, infilling.spm.generated[number]))]


def infill_text(problem: Problem, generated: str) -> str:
    """prefix / [generated] / suffix with the true line below the generated one."""
    before = _lines(problem.prefix)[-CONTEXT_LINES:]
    after = _lines(problem.suffix)[:CONTEXT_LINES]
    parts = [("prefix", before), ("[generated]", _written(generated, GENERATED_LINES))]
    parts += [("true line", _lines(problem.middle)), ("suffix", after)]
    return "\n".join(
        f"{label if first == 0 else '':<11} | {line}"
        for label, lines in parts
        for first, line in enumerate(lines)
    )


def _sample(sample: results.Sample, what: str) -> list[str]:
    return [
        f"The {what}, to `{sample.stage}`:",
        _fenced("\n".join(_lines(sample.prompt))),
        "and what it wrote:",
        _fenced("\n".join(_written(sample.answer))),
    ]


def _not_run(run: results.Results, what: str) -> list[str]:
    return [f"Not run: {run.skipped[what]}." if what in run.skipped else "Not run."]


def _places(run: results.Results) -> list[str]:
    checkpoints = [
        f"- `{Path(run.workdir) / stage.name}`: checkpoints of stage `{stage.name}`"
        for stage in run.stages
    ]
    exports = [f"- `{e.path}`: weights of `{e.stage}` for Hugging Face" for e in run.exports]
    checks = [f"The export of `{e.stage}` was loaded again: {_same(e)}." for e in run.exports]
    return ["\n".join(checkpoints + exports), *checks]


def _same(export: results.Export) -> str:
    if export.difference == 0:
        return "its logits are the trained model's to the last bit"
    return f"its logits differ from the trained model's by {export.difference:.1e} at most"


# -- on the terminal -----------------------------------------------------------------------------


def show(run: results.Results, path: Path | None = None) -> None:
    """Prints the report in short. path: where the whole of it lies."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(Padding(Text(text), (0, 0, 1, 2)))

    def head(text: str) -> None:
        console.print(Text(text, style="bold"))

    head("Held-out loss of every stage, nats per token")
    stages = tables.stages(run.stages, read_history(run))
    console.print(_rich(stages.without("starts from", "tokens/s")))  # what fits a terminal
    if run.long_context:
        head("Long context")
        say(results.long_context_words(run.long_context))
    if run.infilling:
        infilling = run.infilling
        head(f"Infilling of {infilling.middles.problems} held-out lines")
        console.print(_rich(tables.bits(infilling.middles)))
        console.print(_rich(tables.gains(infilling.middles)))
        say(_infilling_words(run))
        shown, _ = results.examples(infilling, count=1)
        say(infill_text(infilling.problems[shown[0]], infilling.spm.generated[shown[0]]))
    for name, sample in (("Completion", run.completion), ("Chat", run.chat)):
        if sample:
            head(f"{name}, by {sample.stage}")
            say("\n".join([*_lines(sample.prompt), "->", *_written(sample.answer)]))
    for export in run.exports:
        say(f"Exported to {export.path}: {_same(export)}.")
    if path:
        console.print(Text(f"The whole report: {path}", style="bold"))


def _rich(table: tables.Table):
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for name, number in zip(table.header, table.numbers(), strict=True):
        made.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        made.add_row(*[Text(cell) for cell in row])
    made.caption = " "
    return made


# -- text ----------------------------------------------------------------------------------------


def _markdown(table: tables.Table) -> str:
    rules = ["--:" if number else "---" for number in table.numbers()]
    return "\n".join(f"| {' | '.join(line)} |" for line in (table.header, rules, *table.rows))


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _lines(text: str) -> list[str]:
    """Lines fit to print: tabs as spaces, other control characters as U+FFFD."""
    return [
        "".join(c if c.isprintable() else "\ufffd" for c in line.rstrip("\r").expandtabs(4))
        for line in text.removesuffix("\n").split("\n")
    ]


def _written(text: str, most: int = ANSWER_LINES) -> list[str]:
    """Lines that a model wrote: without blank ones at the end, and not too many."""
    if not text.strip():
        return ["(nothing but blank lines)" if text else "(nothing)"]
    lines = _lines(text.rstrip())
    return lines if len(lines) <= most else [*lines[:most], "..."]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
