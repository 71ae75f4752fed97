"""Evals on models whose answers are known: zero weights, mocked losses, a generator that copies."""

import bisect
import contextlib
import heapq
import inspect
import json
import keyword
import math
import statistics
import textwrap
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax import config, prompts, sharding, state, tokenizer
from codellama_jax.data import corpus, pipeline
from codellama_jax.data import rows as data_rows
from codellama_jax.data.inputs import Input
from codellama_jax.evals import bootstrap, heldout, infilling, scoring
from codellama_jax.tokenizer import training

LAYOUT = config.Layout(compute_dtype="float32", remat="none")
# Files of one chunk (4,096 characters) and of many.
MODULES = (textwrap, inspect, statistics, bootstrap, scoring, keyword, bisect, heapq, contextlib)
FUNCTION = '''def area_{i}(width, height):
    """Area of rectangle {i}.

    a sentence of prose in the docstring
    """
    # a comment that is long enough
    total = width * height + {i}
    if total > {i}000:
        total = total - offset_{i}
    return total, {i}
'''


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(tokenizer, corpus folder): 60 functions, and files of Python's own."""
    folder = tmp_path_factory.mktemp("evals")
    files = [inspect.getsource(module) for module in MODULES]
    functions = [FUNCTION.format(i=i) for i in range(60)]
    training.train([*files, *functions], 512, folder / "tokenizer.model")
    tok = tokenizer.Tokenizer(folder / "tokenizer.model")

    def written(name, texts):
        rows = [
            {"text": text, "path": f"{i}.py", "language": "python"} for i, text in enumerate(texts)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Input(str(folder / f"{name}.jsonl"), name)

    given = (written("code", functions), written("code_files", files))
    request = pipeline.Request(given, forms=(), jaccard=0, heldout_rate=0.4)
    pipeline.prepare(folder / "corpus", tok, request)
    return tok, folder / "corpus"


@pytest.fixture(scope="module")
def model(prepared):
    return config.Model(
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_dim=64,
        vocab_size=prepared[0].vocab_size,
        rope_theta=1e4,
        max_seq_len=128,
        norm_eps=1e-5,
    )


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(LAYOUT)


@pytest.fixture(scope="module")
def zeros(model):
    """Weights that find every token equally likely: every loss is log(vocabulary)."""
    return jax.tree.map(lambda w: np.zeros(w.shape, w.dtype), state.abstract_params(model))


@pytest.fixture(scope="module")
def problems(prepared):
    tok, folder = prepared
    return infilling.problems(folder, tok, count=20, max_tokens=256, seed=0)


def a_stage(model, **data) -> config.Stage:
    values = {"mix": {"code": 1.0}, "seq_len": 128, "batch_tokens": 1_024, "infilling_rate": 0.9}
    optim = config.Optim(1e-3, 1, 0.1, 0.9, 0.95, 1e-5, 0.1, 1.0)
    return config.Stage(
        name="code",
        start_from=None,
        model=model,
        data=config.Data(**(values | data)),
        optim=optim,
        steps=10,
        layout=LAYOUT,
        eval_rows=8,
    )


# -- problems ------------------------------------------------------------------------------------


def test_a_problem_is_a_held_out_document_with_one_line_of_code_taken_out(prepared, problems):
    tok, folder = prepared
    split = corpus.open(folder, tok).split("code", "heldout")
    assert len(problems) == 20
    for problem in problems:
        whole = problem.prefix + problem.middle + problem.suffix
        assert whole == split.record(problem.document)["text"]
        assert problem.prefix.endswith("\n") and problem.middle.endswith("\n")
        assert problem.middle.count("\n") == 1 and problem.suffix.strip()
        assert not any(word in problem.middle for word in ("prose", "comment", '"""', "def "))


def test_problems_are_the_same_each_time_and_at_most_two_are_of_a_document(prepared, problems):
    tok, folder = prepared
    again = infilling.problems(folder, tok, count=20, max_tokens=256, seed=0)
    more = infilling.problems(folder, tok, count=1_000, max_tokens=256, seed=0)
    other = infilling.problems(folder, tok, count=20, max_tokens=256, seed=1)
    assert again == problems and other != problems
    counts = np.bincount([problem.document for problem in more])
    assert counts.max() == 2 and len(set(more)) == len(more)


def test_a_second_line_of_a_document_is_used_only_when_documents_run_out(prepared):
    tok, folder = prepared
    held_out = len(corpus.open(folder, tok).split("code", "heldout"))
    few = infilling.problems(folder, tok, count=held_out, max_tokens=256, seed=0)
    assert len({problem.document for problem in few}) == held_out


def test_problems_fit_max_tokens_in_every_form(prepared):
    tok, folder = prepared
    every = infilling.problems(folder, tok, count=1_000, max_tokens=256, seed=0)
    longest = max(
        len(example.tokens)
        for form in ("psm", "psm_no_suffix", "spm", "spm_no_suffix", "plain")
        for example in infilling._examples(tok, every, form)
    )
    assert longest <= 256
    assert infilling.problems(folder, tok, count=9, max_tokens=longest, seed=0)
    assert not infilling.problems(folder, tok, count=9, max_tokens=10, seed=0)


def test_lines_end_at_newlines_only():
    text = "first_line = 1\r\nsecond = '\x0c\u2028'; third = 3\nlast_without_newline = 4"
    assert infilling.code_lines(text) == [0, 1]
    assert "".join(infilling._lines(text)) == text


# -- scoring -------------------------------------------------------------------------------------


def test_scored_tokens_are_those_of_the_training_format(prepared, problems):
    tok, _ = prepared
    for form in ("psm", "spm"):
        for problem, example in zip(
            problems, infilling._examples(tok, problems, form), strict=True
        ):
            trained = prompts.infilling_example(
                tok, problem.prefix, problem.middle, problem.suffix, suffix_first=form == "spm"
            )
            assert example.tokens == trained[:-1]  # less EOS
            scored = example.tokens[-example.scored :]
            assert scored[-1] == tok.eot_id
            assert tok.decode_infilling(scored[:-1]) == problem.middle


def test_the_line_has_the_same_tokens_in_every_form(prepared, problems):
    tok, _ = prepared
    lines = [
        [[t for t in e.tokens[-e.scored :] if t != tok.eot_id] for e in examples]
        for examples in (infilling._examples(tok, problems, form) for form in infilling.FORMS)
    ]
    assert all(line == lines[0] for line in lines)


def test_packed_examples_score_as_each_alone(prepared, problems, model, mesh):
    tok, _ = prepared
    params = jax.tree.map(lambda w: 5 * w, state.init_params(model, 0))
    examples = [*infilling._examples(tok, problems[:5], "psm")]
    examples += infilling._examples(tok, problems[:5], "plain")
    together = infilling._score(model, params, examples, tok, LAYOUT, mesh)
    alone = [infilling._score(model, params, [e], tok, LAYOUT, mesh) for e in examples]
    np.testing.assert_allclose(together, np.array(alone)[:, :, 0].T, rtol=1e-4)
    assert together[1][5:].tolist() == [0] * 5  # plain has no EOT


def test_a_model_without_preferences_pays_log_v_for_every_token(
    prepared, problems, model, mesh, zeros
):
    tok, _ = prepared
    result = infilling.bits_per_byte(model, zeros, tok, problems, layout=LAYOUT, mesh=mesh)
    count = sum(len(tok.encode_infilling(problem.middle)) for problem in problems)
    size = sum(len(problem.middle.encode()) for problem in problems)
    for form in infilling.FORMS:
        expected = count * math.log2(model.vocab_size) / size
        assert result.bits_per_byte[form].mean == pytest.approx(expected, rel=1e-5)
    for gain in result.gain.values():
        assert gain.mean == pytest.approx(0, abs=1e-6)
    assert result.eot_nats["psm"] == pytest.approx(math.log(model.vocab_size), rel=1e-5)
    assert "plain" not in result.eot_nats


def test_gains_are_positive_where_the_right_suffix_helps(
    prepared, problems, model, mesh, monkeypatch
):
    """Losses are mocked: a token costs 1 where the suffix of the same document is seen, else 2."""
    tok, _ = prepared
    helped = {
        tuple(e.tokens) for form in ("psm", "spm") for e in infilling._examples(tok, problems, form)
    }

    def losses(model, params, rows, *, layout, mesh):
        nll = np.zeros(rows["loss_mask"][:, 1:].shape)
        for r, segments in enumerate(rows["segments"]):
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                seen = tuple(rows["tokens"][r][inside].tolist())
                nll[r][inside[1:]] = 1 if seen in helped else 2
        mask = rows["loss_mask"][:, 1:]
        return np.where(mask, nll, 0), mask

    monkeypatch.setattr(scoring, "losses", losses)
    result = infilling.bits_per_byte(model, {}, tok, problems, layout=LAYOUT, mesh=mesh)
    bits = result.bits_per_byte
    for form in ("psm_no_suffix", "spm_no_suffix", "spm_other", "plain"):
        assert bits[form].mean == pytest.approx(2 * bits["psm"].mean)
    assert bits["spm"] == bits["psm"]
    size = sum(len(problem.middle.encode()) for problem in problems)
    ends = len(problems) / math.log(2) / size  # a nat saved on each EOT
    for name, gain in result.gain.items():
        expected = bits["psm"].mean + ends * name.endswith("with_end")
        assert gain.mean == pytest.approx(expected) and gain.low > 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_packing_keeps_every_thing_once_and_within_capacity(lengths):
    rows = infilling.pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)
    if lengths:  # no two rows would have fitted into one
        sums = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(rows) == 1 or sums[0] + sums[1] > 20


def test_losses_do_not_depend_on_the_mesh_or_the_batch(model, monkeypatch):
    params = jax.tree.map(lambda w: 5 * w, state.init_params(model, 0))
    params = jax.device_put(params, jax.devices()[0])  # as a checkpoint is read for one device
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, model.vocab_size, 100).tolist() for _ in range(5)]
    packed = [data_rows.pack([i[:60], i[60:]], capacity=129) for i in ids]
    rows = {key: np.stack([row[key] for row in packed]) for key in packed[0]}
    one = sharding.make_mesh(LAYOUT, jax.devices()[:1])
    eight = sharding.make_mesh(LAYOUT)
    whole = scoring.losses(model, params, rows, layout=LAYOUT, mesh=one)
    spread = scoring.losses(model, params, rows, layout=LAYOUT, mesh=eight)
    monkeypatch.setitem(scoring.TOKENS_PER_DEVICE, "cpu", 256)  # two rows at a time
    cut = scoring.losses(model, params, rows, layout=LAYOUT, mesh=one)
    assert whole[0].shape == (5, 128) and whole[1].sum() == 5 * 98
    for other in (spread, cut):
        np.testing.assert_allclose(other[0], whole[0], rtol=1e-4, atol=1e-5)
        assert (other[1] == whole[1]).all()


# -- held out ------------------------------------------------------------------------------------


def test_held_out_losses_are_nats_per_token_and_bits_per_byte(prepared, model, mesh, zeros):
    tok, folder = prepared
    stage = a_stage(model, mix={"code": 0.5, "code_files": 0.5})
    measured = heldout.losses(stage, zeros, folder, tok, mesh, rows=4)
    assert sorted(measured) == ["code", "code_files"]
    for loss in measured.values():
        assert loss.nats == pytest.approx(math.log(model.vocab_size), rel=1e-5)
        assert 4 * 100 < loss.tokens <= 4 * 128
        # a token of this vocabulary stands for one to four bytes
        bits_per_token = math.log2(model.vocab_size)
        assert bits_per_token / 4 < loss.bits_per_byte < bits_per_token


def test_the_judge_says_the_same_of_the_same_weights_in_json(prepared, model, mesh):
    tok, folder = prepared
    judge = heldout.Judge(a_stage(model), folder, tok, mesh)
    params = state.init_params(model, 0)
    values = judge(params)
    assert json.loads(json.dumps(values)) == values == judge(params)
    assert set(values) == {"heldout", "infilling"}
    assert set(values["infilling"]) == set(infilling.FORMS)


def test_the_judge_asks_no_infilling_of_a_stage_that_trains_none(prepared, model, mesh, zeros):
    tok, folder = prepared
    judge = heldout.Judge(a_stage(model, infilling_rate=0.0), folder, tok, mesh)
    assert set(judge(zeros)) == {"heldout"}


def test_loss_by_position_covers_rows_longer_than_the_model_was_trained_on(
    prepared, model, mesh, zeros
):
    tok, folder = prepared
    curve = heldout.by_position(
        model, zeros, folder, tok, mesh, length=512, layout=LAYOUT, old_length=128, buckets=8
    )
    assert curve.edges == list(range(0, 513, 64)) and len(curve.mean) == len(curve.error) == 8
    np.testing.assert_allclose(curve.mean, math.log(model.vocab_size), rtol=1e-5)
    assert curve.past.mean == pytest.approx(0, abs=1e-5)
    assert 1 <= curve.documents <= curve.windows <= 192


def test_loss_by_position_sees_rope_theta(prepared, model, mesh):
    tok, folder = prepared
    params = jax.tree.map(lambda w: 5 * w, state.init_params(model, 0))
    curves = [
        heldout.by_position(
            replace(model, rope_theta=theta), params, folder, tok, mesh, length=256, layout=LAYOUT
        )
        for theta in (1e4, 1e6)
    ]
    assert curves[0].mean != curves[1].mean and curves[0].past is None


def test_text_that_is_harder_further_on_is_no_difference_between_positions():
    difficulty = np.random.default_rng(0).normal(size=40)  # of each piece of a document's text
    rows = [[difficulty[row + bucket] for bucket in range(4)] for row in range(12)]
    pieces, owners = heldout.same_text(np.array(rows + rows[:5]), [7] * 12 + [9] * 5)
    assert pieces.shape == (9 + 2, 4) and owners == [7] * 9 + [9] * 2
    assert np.ptp(pieces, axis=1).max() == 0


def test_windows_are_overlapping_pieces_of_one_document(prepared):
    tok, folder = prepared
    rows, documents = heldout._windows(folder, tok, "code_files", 256, 64, 64)
    split = corpus.open(folder, tok).split("code_files", "heldout")
    sizes = [len(split.record(document)["text"]) for document in documents]
    assert min(sizes) < 4_096 < max(sizes)
    assert len(documents) > len(set(documents))
    last = {}
    for row, document in zip(rows["tokens"], documents, strict=True):
        assert row[0] == tok.bos_id
        text = split.record(document)["text"]
        if document in last:  # the stride further on
            assert (row[1:193] == last[document][65:]).all()
            assert tok.decode_infilling(row[1:]) in text
        else:
            assert text.startswith(tok.decode(row[1:]))
        last[document] = row


def test_a_length_that_no_document_has_is_refused_with_the_longest(prepared, model, mesh, zeros):
    tok, folder = prepared
    with pytest.raises(
        ValueError, match="has the [0-9]+ tokens that are needed; the longest has [0-9]+"
    ):
        heldout.by_position(model, zeros, folder, tok, mesh, length=2**20, layout=LAYOUT)
    with pytest.raises(ValueError, match="length=100 does not divide into buckets=8"):
        heldout.by_position(model, zeros, folder, tok, mesh, length=100, layout=LAYOUT)


# -- exact match ---------------------------------------------------------------------------------


class Copier:
    """A generator that knows the answers, and changes them."""

    def __init__(self, problems, change):
        self.answers = {(p.prefix, p.suffix): change(p.middle) for p in problems}

    def infill(self, prefixes, suffixes, *, suffix_first, max_new_tokens, temperature):
        assert temperature == 0
        return [self.answers[pair] for pair in zip(prefixes, suffixes, strict=True)]


@pytest.mark.parametrize(
    ("change", "exact", "stripped", "first_line"),
    [
        (lambda line: line, 1, 1, 1),
        (lambda line: line.strip(), 0, 1, 1),
        (lambda line: line + "    more()\n", 0, 0, 1),
        (lambda line: "pass\n", 0, 0, 0),
        (lambda line: "", 0, 0, 0),
    ],
)
def test_exact_match_counts_each_kind_of_likeness(problems, change, exact, stripped, first_line):
    match = infilling.exact_match(Copier(problems, change), problems, True, 32)
    assert (match.exact, match.stripped, match.first_line) == (exact, stripped, first_line)
    assert match.problems == len(problems) == len(match.generated)


def test_no_problems_is_said_in_words(prepared, model, mesh, zeros):
    with pytest.raises(ValueError, match="no infilling problems"):
        infilling.bits_per_byte(model, zeros, prepared[0], [], layout=LAYOUT, mesh=mesh)


# -- bootstrap -----------------------------------------------------------------------------------


def test_the_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap.interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std() / 20, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap.interval(values) == found


def test_copies_within_a_group_do_not_make_it_surer():
    values = np.random.default_rng(0).normal(3, 2, 100)
    groups = np.arange(100)
    once = bootstrap.interval(values, groups=groups)
    copied = bootstrap.interval(np.tile(values, 4), groups=np.tile(groups, 4))
    assert copied.mean == pytest.approx(once.mean)
    assert copied.error == pytest.approx(once.error, rel=1e-6)


def test_a_ratio_weighs_by_bytes_and_a_constant_has_no_error():
    assert bootstrap.interval([1.0, 6.0], [1.0, 3.0]).mean == 7 / 4
    assert bootstrap.interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).error == pytest.approx(0)
