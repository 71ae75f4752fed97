"""What a whole run earned, as values, and the sentences that follow from them.

The sentences judge: what they say is computed from the numbers, so they cannot flatter.
"""

from dataclasses import dataclass, field

from codellama_jax import config
from codellama_jax.evals.bootstrap import Interval
from codellama_jax.evals.heldout import ByPosition
from codellama_jax.evals.infilling import ExactMatch, Middles, Problem


@dataclass(frozen=True)
class LongContext:
    """Loss by position of the stage before and of the long-context stage, on the same rows."""

    stage_before: str
    stage_after: str
    before: ByPosition
    after: ByPosition


@dataclass(frozen=True)
class Infilling:
    """How one stage fills single held-out lines."""

    stage: str
    problems: list[Problem]
    middles: Middles
    psm: ExactMatch
    spm: ExactMatch


@dataclass(frozen=True)
class Sample:
    """A prompt (or a question) and what the stage wrote."""

    stage: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Export:
    """Weights in another format, loaded again. difference: largest of the logits from ours."""

    stage: str
    path: str
    difference: float


@dataclass(frozen=True)
class Results:
    """All that a report says. What was not run is None or empty; `skipped` may say why."""

    title: str
    command: str  # that made this
    workdir: str  # holds a folder with metrics.jsonl per stage
    stages: list[config.Stage]
    seconds: float | None = None  # of the whole run
    long_context: LongContext | None = None
    infilling: Infilling | None = None
    completion: Sample | None = None
    chat: Sample | None = None
    exports: list[Export] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name of a field above: the reason

    def stage(self, name: str) -> config.Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def tokens_of(self, name: str) -> int:
        """Tokens that the weights of a stage were trained on, in it and the stages before it."""
        stage = self.stage(name)
        known = any(stage.start_from == other.name for other in self.stages)
        return stage.tokens + (self.tokens_of(stage.start_from) if known else 0)


# -- sentences -----------------------------------------------------------------------------------


def infilling_words(infilling: Infilling, model: config.Model, tokens: int) -> str:
    """An honest summary of the infilling numbers, for a model trained on `tokens`."""
    gain = infilling.middles.gain
    plain = "plain reading from left to right"
    return " ".join(
        [
            f"In SPM the right suffix {gain_words(gain['spm'], 'no suffix')}; it "
            f"{gain_words(gain['spm_over_other'], 'the suffix of another document')}, and "
            f"{gain_words(gain['spm_over_plain'], plain)}.",
            f"Counting the end of the line, it {gain_words(gain['spm_with_end'], 'no suffix')}.",
            f"In PSM it {gain_words(gain['psm'], 'no suffix')}, and "
            f"{gain_words(gain['psm_over_plain'], plain)}.",
            f"Of {infilling.middles.problems} lines, {_right(infilling.spm)} are written right in "
            f"SPM and {_right(infilling.psm)} in PSM.",
            _quality(infilling, model, tokens),
        ]
    ).strip()


def gain_words(gain: Interval, against: str) -> str:
    """What a paired difference says, e.g. "saves 0.0310 bits per byte against no suffix (...)"."""
    interval = f"95% interval {gain.low:+.4f} to {gain.high:+.4f}"
    if gain.low > 0:
        return f"saves {gain.mean:.4f} bits per byte against {against} ({interval})"
    if gain.high < 0:
        return f"costs {-gain.mean:.4f} bits per byte against {against} ({interval})"
    return f"makes no measurable difference against {against} ({gain.mean:+.4f}, {interval})"


def long_context_words(result: LongContext) -> str:
    """What the loss does past the longest row of the stage before, in both models."""
    end = result.after.mean[-1] - result.before.mean[-1]
    return (
        f"From position {result.before.old_length:,} on, compared with the half before it, the "
        f"loss of `{result.stage_before}` {_course(result.before.past)}; that of "
        f"`{result.stage_after}` {_course(result.after.past)}. In the last positions of the row "
        f"`{result.stage_after}` is {abs(end):.3f} nats {'better' if end < 0 else 'worse'}."
    )


def _course(past: Interval) -> str:
    interval = f"95% interval {past.low:+.3f} to {past.high:+.3f}"
    if past.low > 0:
        return f"rises by {past.mean:.3f} nats ({interval})"
    if past.high < 0:
        return f"goes on falling, by {-past.mean:.3f} nats ({interval})"
    return f"neither rises nor falls for sure ({past.mean:+.3f} nats, {interval})"


def _right(match: ExactMatch) -> str:
    return f"{round(match.stripped * match.problems)} ({match.stripped:.1%})"


def _quality(infilling: Infilling, model: config.Model, tokens: int) -> str:
    best = max(infilling.spm.stripped, infilling.psm.stripped)
    if best >= 0.5:
        return ""
    gain = infilling.middles.gain
    uses = gain["spm"].low > 0 and gain["spm_over_other"].low > 0
    return (
        f"So {'nearly all' if best < 0.1 else 'most'} of its lines are wrong: after "
        f"{tokens / 1e6:,.1f} million tokens a model of {model.num_params / 1e6:,.1f} million "
        f"parameters {'does use' if uses else 'does not yet measurably use'} what stands after the "
        "gap, and is no tool to write code with."
    )


def examples(infilling: Infilling, count: int = 3) -> tuple[list[int], str]:
    """The numbers of problems to show, and a sentence that says how they were chosen."""
    pairs = zip(infilling.spm.generated, infilling.problems, strict=True)
    right = [text.strip() == problem.middle.strip() for text, problem in pairs]
    hits = [number for number, same in enumerate(right) if same]
    misses = [number for number, same in enumerate(right) if not same]
    if not hits:
        return misses[:count], "The first problems; none is written right."
    if not misses:
        return hits[:count], "The first problems; all are written right."
    chosen = [*hits[:1], *misses[: count - 1]]
    return chosen, "The first line that is written right, then the first that are not."
