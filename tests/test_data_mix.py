"""data/mix.py: the batch of a step is the same for any reader, and shares are kept."""

import hashlib

import corpus_fixture
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import mix

STEPS = 6


def read(data=None, **options):
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    options = {"steps": STEPS} | options
    return list(mix.batches(data or corpus_fixture.data(), folder, tokenizer, **options))


def digest(batches) -> str:
    """Of all arrays in order."""
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            total.update(np.ascontiguousarray(batch[name]).tobytes())
    return total.hexdigest()


def joined(parts):
    """The global batches out of those of every process."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def one_process():
    return read()


def test_a_batch_has_these_arrays(one_process):
    assert len(one_process) == STEPS
    assert {name: (x.shape, x.dtype) for name, x in one_process[0].items()} == {
        "tokens": ((8, 65), np.int32),
        "loss_mask": ((8, 65), np.bool_),
        "segments": ((8, 65), np.int32),
        "positions": ((8, 65), np.int32),
        "corpus": ((8,), np.int32),
    }


@pytest.mark.parametrize("count", [2, 4, 8])
def test_batches_are_equal_for_any_number_of_processes(one_process, count):
    parts = [read(process_index=index, process_count=count) for index in range(count)]
    assert digest(joined(parts)) == digest(one_process)


@pytest.mark.parametrize("start", [1, 4, STEPS])
def test_batches_are_equal_from_any_step(one_process, start):
    assert digest(read(start_step=start)) == digest(one_process[start:])


def test_batches_are_equal_for_any_number_of_workers(one_process):
    data = corpus_fixture.data(workers=2)
    assert digest(read(data, start_step=1)) == digest(one_process[1:])


def test_a_batch_is_the_rows_that_the_mixture_describes(one_process):
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    data = corpus_fixture.data()
    mixture = mix.open_mixture(data, folder, tokenizer)
    for step, batch in enumerate(one_process):
        for place in range(8):
            name, pieces = mixture.describe(step * 8 + place)
            assert name == mix.names(data)[batch["corpus"][place]]
            ids = [token for piece in pieces for token in piece.tokens]
            assert batch["tokens"][place][: len(ids)].tolist() == ids


def test_seeds_give_different_batches(one_process):
    assert digest(read(corpus_fixture.data(seed=1))) != digest(one_process)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(0, 10**13))
def test_every_corpus_is_read_in_order_without_a_gap(weights, start):
    schedule = mix.Schedule([weight / sum(weights) for weight in weights])
    following = schedule.counts(start)
    assert sum(following) == start
    for k in range(start, start + 50):
        number, own_index = schedule[k]
        assert own_index == following[number]
        following[number] += 1


@pytest.mark.parametrize(
    "shares",
    [(0.85, 0.08, 0.07), (0.75, 0.10, 0.10, 0.05), (0.92, 0.06, 0.02), (1.0,), (1 / 3,) * 3],
)
def test_shares_are_exact_to_a_row(shares):
    schedule = mix.Schedule(list(shares))
    for k in (10, 1_000, 123_457, 10**12):
        for count, share in zip(schedule.counts(k), shares, strict=True):
            assert abs(count - k * share) <= 1 + k * 1e-6 * len(shares)
    rows = [schedule[k][0] for k in range(1_000)]
    for number, share in enumerate(shares):
        assert rows.count(number) / 1_000 == pytest.approx(share, abs=1e-3)
        for first in range(0, 1_000, 100):  # and evenly spread
            assert rows[first : first + 100].count(number) == pytest.approx(100 * share, abs=2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=6),
    st.integers(2, 4_096),
    st.integers(1_000, 10**6),
)
def test_realised_shares_are_within_a_thousandth_from_1_000_steps_on(weights, rows, steps):
    shares = [weight / sum(weights) for weight in weights]
    counts = mix.Schedule(shares).counts(steps * rows)
    for count, share in zip(counts, shares, strict=True):
        assert abs(count / (steps * rows) - share) <= 1e-3


MIXES = st.dictionaries(
    st.sampled_from(["code", "python", "code_language", "language"]),
    st.integers(1, 20),
    min_size=1,
).map(lambda weights: {name: w / sum(weights.values()) for name, w in weights.items()})


def mixture_of(data):
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    return mix.open_mixture(data, folder, tokenizer)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(MIXES, st.integers(1, 40)), min_size=2, max_size=4))
def test_a_change_of_mix_between_stages_loses_nothing_and_repeats_nothing(stages):
    places, already = {}, {}
    for weights, steps in stages:
        data = corpus_fixture.data(mix=weights, already=already, infilling_rate=0.5)
        one = mixture_of(data)
        for k in range(steps * data.rows_per_batch):
            number, own_index = one.place(k)
            places.setdefault(one.rows[number].name, []).append(own_index)
        already = mix.read_by(data, steps)
    for name, own in places.items():  # every row from the first on, once, in order
        assert own == list(range(len(own))) and already[name] == len(own) * 64


def test_a_stage_reads_on_where_the_one_before_has_stopped():
    before = corpus_fixture.data(mix={"code": 0.7, "language": 0.3})
    after = corpus_fixture.data(
        mix={"code": 1.0}, already={"code": mix.read_by(before, 30)["code"]}
    )
    rows = [
        row for batch in read(before, steps=30) for row in batch["tokens"][batch["corpus"] == 0]
    ]
    rows += [row for batch in read(after, steps=20) for row in batch["tokens"]]
    alone = read(corpus_fixture.data(mix={"code": 1.0}), steps=50)
    expected = [row for batch in alone for row in batch["tokens"]]
    assert (np.array(rows) == np.array(expected[: len(rows)])).all()


@settings(max_examples=15, deadline=None)
@given(MIXES, st.integers(1, 60), st.integers(0, 40_000))
def test_epochs_are_those_of_the_rows_that_are_read(weights, steps, already):
    already = {name: already for name in weights}
    data = corpus_fixture.data(mix=weights, already=already, infilling_rate=0.5)
    one = mixture_of(data)
    read_rows = [[] for _ in one.rows]
    for k in range(steps * data.rows_per_batch):
        number, own_index = one.place(k)
        read_rows[number].append(own_index)
    epochs = one.epochs(steps)
    for rows, own in zip(one.rows, read_rows, strict=True):
        assert epochs[rows.name] == pytest.approx(len(own) / rows.rows_per_epoch)
        for index in own[-1:]:
            assert rows.describe(index)[0].epoch == index // rows.rows_per_epoch


def test_epochs_are_counted():
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    data = corpus_fixture.data()
    mixture = mix.open_mixture(data, folder, tokenizer)
    steps = 50
    for name, epochs in mixture.epochs(steps).items():
        one = next(rows for rows in mixture.rows if rows.name == name)
        expected = data.mix[name] * steps * data.rows_per_batch / one.rows_per_epoch
        assert epochs == pytest.approx(expected, abs=1 / one.rows_per_epoch)


def test_dialogues_and_documents_mix():
    data = corpus_fixture.data(
        mix={"dialogues": 0.92, "code": 0.06, "language": 0.02}, seq_len=200, batch_tokens=800
    )
    kinds = {kind for batch in read(data) for kind in batch["corpus"].tolist()}
    assert kinds == {0, 1} or kinds == {0, 1, 2}
    assert mix.names(data) == ["code", "dialogues", "language"]


def test_documents_can_share_attention():
    batch = read(corpus_fixture.data(attend_across_documents=True), steps=1)[0]
    inside = batch["segments"] > 0
    assert set(np.unique(batch["segments"])) <= {0, 1}
    assert (batch["positions"][inside] == np.nonzero(inside)[1]).all()
    apart = read(steps=1)[0]
    assert (batch["tokens"] == apart["tokens"]).all()
    assert (batch["loss_mask"] == apart["loss_mask"]).all()


def test_held_out_rows_are_plain_and_not_trained_on():
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    rows = mix.heldout_rows(corpus_fixture.data(), folder, tokenizer, "code", 5)
    assert rows["tokens"].shape == (5, 65)
    assert tokenizer.middle_id not in rows["tokens"]
    everything = mix.heldout_rows(corpus_fixture.data(), folder, tokenizer, "code", 10**6)
    split = corpus_fixture.prepared().split("code", "heldout")
    assert (everything["segments"] > 0).sum() == split.lengths.sum()


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"code": 0.5, "rust": 0.5}}, "no corpus 'rust'; it has"),
        ({"mix": {"empty": 1.0}}, "no corpus 'empty'"),
        ({"batch_tokens": 64 * 4_000}, "fewer than the .* of one batch"),
        (
            {"mix": {"dialogues": 1.0}, "seq_len": 200, "batch_tokens": 200},
            "infilling_rate=0.9 has no effect",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(corpus_fixture.data(**changes))


def test_rows_that_do_not_divide_among_processes_are_refused():
    with pytest.raises(ValueError, match="8 rows does not divide among 3 processes"):
        read(process_count=3)


def test_infilling_without_infilling_pieces_is_refused(outside_material):
    from codellama_jax.data import infilling
    from codellama_jax.data.rows import Rows
    from codellama_jax.tokenizer import Tokenizer

    llama2 = Tokenizer(outside_material / "tokenizer" / "llama2_tokenizer.model")
    split = corpus_fixture.prepared().split("code", "train")
    with pytest.raises(ValueError, match="needs a tokenizer with infilling pieces"):
        Rows(split, llama2, name="code", seed=0, seq_len=64, rates=infilling.Rates(0.9))


def test_another_tokenizer_is_refused():
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.other_tokenizer()
    with pytest.raises(ValueError, match="prepared for another tokenizer"):
        mix.batches(corpus_fixture.data(), folder, tokenizer, steps=1)


# -- looking back -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=5), st.integers(0, 10**9))
def test_the_row_of_the_stage_is_found_from_that_of_its_corpus(weights, k):
    schedule = mix.Schedule([weight / sum(weights) for weight in weights])
    assert schedule.find(*schedule[k]) == k


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mix": {"dialogues": 0.9, "code": 0.1}, "seq_len": 200, "batch_tokens": 800},
        {"already": {"code": 100_000}},
    ],
)
def test_a_file_is_found_at_exactly_the_steps_that_read_it(changes):
    data = corpus_fixture.data(**changes)
    folder, tokenizer = corpus_fixture.prepared().folder, corpus_fixture.tokenizer()
    mixture = mix.open_mixture(data, folder, tokenizer)
    steps, path = 120, "package1/module_1.py"
    expected = set()
    for k in range(steps * data.rows_per_batch):
        name, pieces = mixture.describe(k)
        if any(piece.record["path"] == path for piece in pieces):
            expected.add((*divmod(k, data.rows_per_batch), name, pieces[0].epoch))
    assert len(expected) > 10 and mixture.steps_of(path, steps) == sorted(expected)
    assert mixture.steps_of("nowhere.py", steps) == []
