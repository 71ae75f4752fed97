"""The report: says what the numbers say, in words, tables and pictures, and is whole or absent."""

import json
from dataclasses import replace

import numpy as np
import pytest

from codellama_jax import config
from codellama_jax.evals.bootstrap import Interval
from codellama_jax.evals.heldout import ByPosition
from codellama_jax.evals.infilling import GAINS, ExactMatch, Middles, Problem
from codellama_jax.report import page, plots, results, tables

MODEL = config.Model(
    dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    ffn_dim=64,
    vocab_size=512,
    rope_theta=1e4,
    max_seq_len=128,
    norm_eps=1e-5,
)
CODE = config.Stage(
    name="code",
    start_from=None,
    model=MODEL,
    data=config.Data({"code": 0.9, "language": 0.1}, 128, 1_024, 0.9),
    optim=config.Optim(1e-3, 1, 0.1, 0.9, 0.95, 1e-5, 0.1, 1.0),
    steps=100,
)
LONG = replace(CODE, name="long_context", start_from="code", steps=20)
PROBLEMS = [
    Problem("def add(a, b):\n\t'''Sum.'''\n", "\treturn a + b\n", "\n# ``` end\n", 0, "add.py"),
    Problem("def sub(a, b):\n", "    return a - b\n", "\nx = 1\n", 1, "sub.py"),
    Problem("def mul(a, b):\n", "    return a * b\n", "\ny = 2\n", 2, "mul.py"),
    Problem("def div(a, b):\n", "    return a / b\n", "\nz = 3\n", 3, "div.py"),
]


def around(mean: float, half: float = 0.01) -> Interval:
    return Interval(mean, mean - half, mean + half, half / 2)


def curve(past: float) -> ByPosition:
    mean = list(np.linspace(5, 4, 4)) + [4 + past] * 12
    return ByPosition(list(range(0, 513, 32)), mean, [0.05] * 16, 14, 43, 128, around(past))


def infilling(spm_gain: float = 0.05, written=("\treturn a + b\n", "x", "\x00y", "z")):
    bits = {form: around(3 + i / 10, 0.2) for i, form in enumerate(plots.FORMS)}
    gain = {name: around(spm_gain if name.startswith("spm") else -0.02) for name in GAINS}
    eot = {form: 5.0 for form in plots.FORMS if form != "plain"}
    spm = ExactMatch(4, 0.25, 0.25, 0.5, list(written))
    psm = ExactMatch(4, 0.0, 0.0, 0.0, ["", "", "", ""])
    return results.Infilling("code", PROBLEMS, Middles(4, 4, bits, gain, eot), psm, spm)


@pytest.fixture
def run(tmp_path) -> results.Results:
    for stage in (CODE, LONG):
        (tmp_path / stage.name).mkdir()
        lines = [{"step": 0, "heldout": {"code": 6.0, "language": 6.5}}]
        lines += [
            {"step": n, "loss": 6 - n / 50, "tokens_per_second": 1_000.0 + n}
            for n in range(10, stage.steps + 1, 10)
        ]
        lines += [{"step": stage.steps, "heldout": {"code": 4.25, "language": 6.75}}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / stage.name / "metrics.jsonl").write_text(text + '{"step": 9')
    return results.Results(
        title="Nano Code Llama",
        command="python recipes/nano.py",
        workdir=str(tmp_path),
        stages=[CODE, LONG],
        seconds=125,
        long_context=results.LongContext("code", "long_context", curve(0.4), curve(-0.1)),
        infilling=infilling(),
        completion=results.Sample("code", "def f(", "x):\n    return x"),
        chat=results.Sample("instruct", "Write f.", ""),
        exports=[results.Export("code", "out/hf", 0.0), results.Export("long", "out/l", 2e-6)],
    )


# -- files ---------------------------------------------------------------------------------------


def test_report_links_the_pictures_that_lie_beside_it(run, tmp_path):
    path = page.write(run, tmp_path / "out")
    text = path.read_text()
    for name in ("losses.png", "by_position.png", "infilling.png"):
        assert f"]({name})" in text
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".md"] + [".png"] * 3
    saved = json.loads((path.parent / "report.json").read_text())
    assert saved["infilling"]["middles"]["gain"]["spm"]["mean"] == 0.05
    assert len(saved["history"]["code"]) == 12  # the half-written line is not one


def test_a_run_of_training_alone_is_reported_and_says_what_was_not_run(run, tmp_path):
    bare = replace(
        run, long_context=None, infilling=None, completion=None, chat=None, exports=[], seconds=None
    )
    bare = replace(bare, skipped={"long_context": "no held-out document is long enough"})
    path = page.write(bare, tmp_path / "out")
    assert path.read_text().count("Not run.") == 3
    assert "Not run: no held-out document is long enough." in path.read_text()
    assert not (path.parent / "infilling.png").exists()


def test_a_picture_that_fails_leaves_no_report_and_no_half_file(run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def savefig(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="No space"):
        page.write(run, tmp_path / "out")
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert not [name for name in names if name.endswith((".md", ".png"))]


# -- words ---------------------------------------------------------------------------------------


def test_held_out_losses_stand_before_and_after_each_stage(run):
    header, rows = tables.stages(run.stages, page.read_history(run))
    assert header[-4:] == ["corpus", "before", "after", "change"]
    assert [row[0] for row in rows] == ["code", "", "long_context", ""]
    assert rows[0][-4:] == ["code", "6.000", "4.250", "-1.750"]
    assert rows[1][-4:] == ["language", "6.500", "6.750", "+0.250"]
    assert rows[0][3] == "1,060"  # the median of 1,010 .. 1,100


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (around(0.05), "saves 0.0500 bits per byte against X (95% interval +0.0400 to +0.0600)"),
        (around(-0.05), "costs 0.0500 bits per byte against X (95% interval -0.0600 to -0.0400)"),
        (around(0.005), "makes no measurable difference against X (+0.0050, 95% interval"),
    ],
)
def test_a_gain_is_called_what_its_interval_says(gain, words):
    assert results.gain_words(gain, "X").startswith(words)


def test_infilling_is_judged_by_its_numbers_alone(run):
    text = results.infilling_words(infilling(0.05), MODEL, 4_000_000)
    assert "In SPM the right suffix saves 0.0500" in text and "In PSM it costs 0.0200" in text
    assert "1 (25.0%) are written right in SPM and 0 (0.0%) in PSM" in text
    assert "most of its lines are wrong" in text and "4.0 million tokens" in text
    assert "does use what stands after the gap" in text
    poor = results.infilling_words(infilling(-0.05), MODEL, 4_000_000)
    assert "In SPM the right suffix costs 0.0500" in poor and "saves" not in poor
    assert "does not yet measurably use what stands after the gap" in poor
    good = replace(infilling(), spm=ExactMatch(4, 1.0, 1.0, 1.0, ["", "", "", ""]))
    assert "wrong" not in results.infilling_words(good, MODEL, 4_000_000)


def test_long_context_is_judged_by_its_numbers_alone():
    one = results.LongContext("code", "long_context", curve(0.4), curve(-0.1))
    text = results.long_context_words(one)
    assert "From position 128 on" in text
    assert "`code` rises by 0.400 nats" in text
    assert "`long_context` goes on falling, by 0.100 nats" in text
    assert "`long_context` is 0.500 nats better" in text
    other = results.LongContext("code", "long_context", curve(0.001), curve(0.4))
    text = results.long_context_words(other)
    assert "neither rises nor falls for sure" in text and "nats worse" in text


def test_tokens_of_a_stage_count_those_of_its_parents(run):
    assert run.tokens_of("code") == 102_400
    assert run.tokens_of("long_context") == 102_400 + 20_480


def test_the_choice_of_infills_is_told():
    some, none = infilling(), infilling(written=["a", "b", "c", "d"])
    every = infilling(written=[problem.middle for problem in PROBLEMS])
    assert results.examples(some) == (
        [0, 1, 2],
        "The first line that is written right, then the first that are not.",
    )
    assert results.examples(none) == ([0, 1, 2], "The first problems; none is written right.")
    assert results.examples(every) == ([0, 1, 2], "The first problems; all are written right.")


def test_an_infill_is_shown_between_prefix_and_suffix_beside_the_true_line():
    assert page.infill_text(PROBLEMS[1], "    return b\n").split("\n") == [
        "prefix      | def sub(a, b):",
        "[generated] |     return b",
        "true line   |     return a - b",
        "suffix      | ",
        "            | x = 1",
    ]


def test_blank_output_is_called_so():
    assert "[generated] | (nothing)" in page.infill_text(PROBLEMS[1], "")
    blank = page.infill_text(PROBLEMS[1], "\n" * 50)
    assert "[generated] | (nothing but blank lines)\ntrue line" in blank


def test_what_a_model_writes_cannot_break_the_report(run):
    wild = infilling(written=["```\n# title\n", "\x1b[31m\x00\r", "\n" * 99, ""])
    text = page.markdown(replace(run, infilling=wild), page.read_history(run))
    assert "\x1b" not in text and "\x00" not in text and "\t" not in text
    assert "````text" in text  # a longer fence around what holds a fence
    assert max(len(block) for block in text.split("\n\n") if "generated" in block) < 2_500


def test_exports_are_compared_in_words(run):
    text = page.markdown(run, page.read_history(run))
    assert "`out/hf`: weights of `code` for Hugging Face" in text
    assert "its logits are the trained model's to the last bit" in text
    assert "differ from the trained model's by 2.0e-06 at most" in text


def test_the_terminal_shows_the_same_numbers(run, capsys):
    page.show(run, path="out/report.md")
    text = capsys.readouterr().out
    for part in ("4.250", "[generated]", "saves 0.0500", "rises by 0.400", "out/report.md"):
        assert part in text.replace("\n", " ") or part in text
