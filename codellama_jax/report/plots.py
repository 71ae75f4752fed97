"""The pictures of a report: loss curves, loss by position, what the suffix gains.

Each takes numbers and a path and writes a PNG, under a temporary name first. Nothing here needs a
display.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.evals.heldout import ByPosition
from codellama_jax.evals.infilling import Middles

# Colours that the colour-blind can tell apart (Okabe and Ito), and brown.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BROWN = "#CC79A7", "#56B4E9", "#7A4B1E"
INK, GREY, GRID = "#222222", "#888888", "#E4E4E4"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
FORMS = {  # how a form is called in pictures and tables
    "psm": "PSM",
    "psm_no_suffix": "PSM, no suffix",
    "spm": "SPM",
    "spm_no_suffix": "SPM, no suffix",
    "spm_other": "SPM, suffix of another document",
    "plain": "plain, left to right",
}
GAINS = {
    "spm": "SPM: against no suffix",
    "spm_over_plain": "SPM: against plain, left to right",
    "spm_over_other": "SPM: against another document's suffix",
    "psm": "PSM: against no suffix",
    "psm_over_plain": "PSM: against plain, left to right",
    "spm_with_end": "SPM: against no suffix, text and end",
    "psm_with_end": "PSM: against no suffix, text and end",
}


def losses(
    stages: Sequence[config.Stage], history: Mapping[str, Sequence[dict]], path: Path
) -> None:
    """Training and held-out loss of every stage over its tokens, each on its own scale.

    history: the lines of each stage's metrics.jsonl (metrics.read).
    """
    columns = min(3, len(stages))
    rows = -(-len(stages) // columns)
    names = sorted({name for stage in stages for name in stage.data.mix})
    colours = dict(zip(names, _cycle([BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BROWN]), strict=False))
    with _figure(path, width=3.6 * columns, height=2.9 * rows + 0.6) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for place, stage in zip(axes.flat, stages, strict=False):
            _loss_curve(place, stage, history[stage.name], colours)
        for place in axes.flat[len(stages) :]:
            place.set_visible(False)
        for place in axes[:, 0]:
            place.set_ylabel("loss, nats per token")
        figure.legend(
            handles=_loss_legend(names, colours),
            loc="outside lower center",
            ncols=min(len(names) + 1, 4),
        )


def _loss_curve(place, stage: config.Stage, lines: Sequence[dict], colours: dict[str, str]) -> None:
    unit = stage.data.batch_tokens / config.M
    trained = [(line["step"] * unit, line["loss"]) for line in lines if "loss" in line]
    if trained:
        place.plot(*zip(*trained, strict=True), color=GREY, linewidth=0.9, zorder=1)
    for name in sorted(stage.data.mix):
        found = [
            (line["step"] * unit, line["heldout"][name])
            for line in lines
            if name in line.get("heldout", {})
        ]
        if found:
            style = "-" if len(found) > 2 else ":"  # of before and after alone, no curve
            points = zip(*found, strict=True)
            place.plot(*points, style, color=colours[name], marker="o", markersize=4, zorder=2)
    place.set_title(stage.name.replace("_", " "))
    place.annotate(
        f"starts from {stage.start_from or 'random weights'}",
        (0.98, 0.97),
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=GREY,
        fontsize=9,
    )
    place.margins(y=0.15)
    place.set_xlabel("million tokens")
    place.set_xlim(left=0)
    place.locator_params(axis="x", nbins=5)


def _loss_legend(names: Sequence[str], colours: dict[str, str]) -> list:
    from matplotlib.lines import Line2D

    training = Line2D([], [], color=GREY, linewidth=0.9, label="training batch")
    held_out = [
        Line2D([], [], color=colours[name], marker="o", markersize=4, label=f"held out: {name}")
        for name in names
    ]
    return [training, *held_out]


def by_position(curves: Mapping[str, ByPosition], path: Path) -> None:
    """Loss by position of some models, e.g. {"before": ..., "after": ...}, each with a band of
    1.96 standard errors of its shape; a line marks the longest row before the stage."""
    with _figure(path, width=7.2, height=4.2) as figure:
        place = figure.subplots()
        for (name, curve), colour in zip(curves.items(), _cycle([ORANGE, BLUE]), strict=False):
            edges, mean = np.array(curve.edges), np.array(curve.mean)
            middle, band = (edges[:-1] + edges[1:]) / 2, 1.96 * np.array(curve.error)
            place.fill_between(
                middle, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0
            )
            place.plot(middle, mean, color=colour, marker="o", markersize=4, label=name)
        one = next(iter(curves.values()))
        if one.old_length:
            place.axvline(one.old_length, color=INK, linestyle="--", linewidth=1)
            place.set_xticks(range(0, one.edges[-1] + 1, one.old_length))
            place.annotate(
                f" longest row before: {one.old_length:,} tokens",
                (one.old_length, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                color=INK,
            )
        place.set_xlim(0, one.edges[-1])
        place.set_xlabel("position in the row, tokens")
        place.set_ylabel("loss, nats per token")
        place.set_title(
            f"Loss by position: {one.windows} rows of {one.documents} held-out files", pad=10
        )
        figure.legend(loc="outside lower center", ncols=len(curves))


def infilling(middles: Middles, path: Path) -> None:
    """Bits per byte of held-out lines in every form, and what the suffix gains, with intervals."""
    with _figure(path, width=10.8, height=3.2) as figure:
        left, right = figure.subplots(1, 2)
        bits = [middles.bits_per_byte[form].mean for form in FORMS]
        names, places = list(FORMS.values()), range(len(FORMS))
        with_suffix = [BLUE if form in ("psm", "spm") else GREY for form in FORMS]
        left.scatter(bits, places, color=with_suffix, zorder=2)
        for place, value in zip(places, bits, strict=True):
            left.annotate(
                f"{value:.3f}", (value, place), (7, 0), textcoords="offset points", va="center"
            )
        spread = max(bits) - min(bits) + 0.02
        left.set_xlim(min(bits) - spread / 4, max(bits) + spread / 2)
        left.set_yticks(places, names)
        left.invert_yaxis()
        left.set_xlabel("bits per byte (less is better)")
        left.set_title(f"The missing line ({middles.problems} of them)")
        _gains(right, middles)


def _gains(place, middles: Middles) -> None:
    # PSM against plain reading is left to the tables: it is about the order more than the suffix.
    shown = [name for name in GAINS if name.startswith("spm") or name == "psm"]
    for number, name in enumerate(shown):
        gain = middles.gain[name]
        colour = GREEN if gain.low > 0 else RED if gain.high < 0 else GREY
        place.hlines(number, gain.low, gain.high, color=colour, linewidth=2)
        place.scatter([gain.mean], [number], color=colour, zorder=2)
    place.axvline(0, color=INK, linewidth=1)
    place.set_yticks(range(len(shown)), [GAINS[name] for name in shown])
    place.margins(y=0.15)
    place.invert_yaxis()
    place.set_xlabel("bits per byte saved, 95% interval")
    place.set_title("What the right suffix saves")


def _cycle(colours: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colours


@contextlib.contextmanager
def _figure(path: Path, *, width: float, height: float):
    """A figure in our style, written to `path` when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
