"""The tables of a report: losses of the stages, and what infilling shows. Every cell is text."""

from collections.abc import Sequence
from typing import NamedTuple

from codellama_jax import config
from codellama_jax.evals.infilling import Middles
from codellama_jax.report import plots, results


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]

    def numbers(self) -> list[bool]:
        """Of each column, whether it holds numbers, which belong at its right."""
        columns = range(len(self.header))
        return [all(_is_number(row[i]) for row in self.rows) for i in columns]

    def without(self, *names: str) -> "Table":
        """The table but for these columns."""
        kept = [i for i, name in enumerate(self.header) if name not in names]
        header, *rows = ([line[i] for i in kept] for line in (self.header, *self.rows))
        return Table(header, rows)


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0] in "+-0123456789"


def stages(stages: Sequence[config.Stage], history: dict[str, list[dict]]) -> Table:
    """One row per stage and corpus, with the held-out loss before and after."""
    header = ["stage", "starts from", "tokens", "tokens/s", "corpus", "before", "after", "change"]
    rows = []
    for stage in stages:
        judged = [line["heldout"] for line in history[stage.name] if "heldout" in line]
        speeds = [line["tokens_per_second"] for line in history[stage.name] if "loss" in line]
        speed = sorted(speeds)[len(speeds) // 2] if speeds else None
        first = [
            stage.name,
            stage.start_from or "nothing",
            f"{stage.tokens / 1e6:,.2f} M",
            f"{speed:,.0f}" if speed else "-",
        ]
        for name in judged[0] if judged else []:
            before, after = judged[0][name], judged[-1][name]
            losses = [name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
            rows.append(first + losses)
            first = [""] * 4
    return Table(header, rows)


def matches(infilling: results.Infilling) -> Table:
    """Shares of lines that are written right, in PSM and in SPM."""
    header = ["exact match", "the line", "but for space around it", "first line of what it wrote"]
    rows = [
        [name, f"{match.exact:.1%}", f"{match.stripped:.1%}", f"{match.first_line:.1%}"]
        for name, match in (("PSM", infilling.psm), ("SPM", infilling.spm))
    ]
    return Table(header, rows)


def bits(middles: Middles) -> Table:
    """What a middle costs, by what is given of its surroundings."""
    header = ["given", "bits per byte", "95% interval", "end of the line (EOT), nats"]
    rows = []
    for form, name in plots.FORMS.items():
        cost, end = middles.bits_per_byte[form], middles.eot_nats.get(form)
        interval = f"{cost.low:.3f} to {cost.high:.3f}"
        rows.append([name, f"{cost.mean:.3f}", interval, "-" if end is None else f"{end:.2f}"])
    return Table(header, rows)


def gains(middles: Middles) -> Table:
    """What the right suffix saves."""
    header = ["the right suffix saves", "bits per byte", "95% interval"]
    rows = [
        [name, f"{gain.mean:+.4f}", f"{gain.low:+.4f} to {gain.high:+.4f}"]
        for name, gain in ((label, middles.gain[key]) for key, label in plots.GAINS.items())
    ]
    return Table(header, rows)
