"""tokenizer.json: the same face as tokenizer.model, nothing lost, marks that can be added."""

import json
import pickle

import hypothesis
import numpy as np
import pytest
from test_tokenizer import TEXTS, check, texts

from codellama_jax import prompts
from codellama_jax.convert import hf_tokenizer, vocabulary
from codellama_jax.tokenizer import INFILLING_PIECES, Tokenizer, beside, json_file
from codellama_jax.tokenizer.training import train

library = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

ENDS = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}}


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Tokenizer:
    """A byte-level BPE as GPT-2's, with infilling marks added."""
    folder = tmp_path_factory.mktemp("byte_level")
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS[:2], trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(ENDS))
    (folder / "grown").mkdir()
    files = (folder / "tokenizer.json", folder / "tokenizer_config.json")
    vocabulary.grow(files, folder / "grown")
    return Tokenizer(folder / "grown/tokenizer.json")


@pytest.fixture(scope="session")
def both(tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """One vocabulary as tokenizer.model and as tokenizer.json."""
    folder = tmp_path_factory.mktemp("both")
    train(TEXTS, 1_024, folder / "tokenizer.model")
    hf_tokenizer.write(folder / "tokenizer.model", folder)
    return Tokenizer(folder / "tokenizer.model"), Tokenizer(folder / "tokenizer.json")


# -- byte-level BPE ------------------------------------------------------------------------------


@check
@hypothesis.given(text=texts)
def test_every_text_survives_and_no_text_becomes_a_mark(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert byte_level.encode_infilling(text) == ids
    assert byte_level.decode_infilling(ids) == text
    assert "".join(byte_level.stream(ids)) == text
    assert sum(byte_level.num_bytes[ids]) == len(text.encode())


@pytest.mark.parametrize("text", ["a<|end|>b", "▁<PRE>x▁<EOT>", "<|start|>"])
def test_text_that_spells_control_ids_stays_text_unless_trusted(byte_level, text):
    t = byte_level
    marks = {t.bos_id, t.eos_id, t.prefix_id, t.suffix_id, t.middle_id, t.eot_id}
    assert len(marks) == 6
    ids = t.encode(text)
    assert not marks & set(ids)
    assert t.decode(ids) == text
    assert marks & set(t.encode(text, control_text=True))


def test_text_has_the_ids_of_the_library(byte_level):
    theirs = library.Tokenizer.from_file(byte_level.path)
    for text in TEXTS[:2]:
        assert byte_level.encode(text[:20_000]) == theirs.encode(text[:20_000]).ids


def test_streaming_holds_back_half_a_character(byte_level):
    ids = byte_level.encode("é🚀 x")
    pieces = list(byte_level.stream(ids))
    assert len(ids) > len(pieces)
    assert "".join(pieces) == "é🚀 x"
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_last_ids_are_the_marks_and_prompts_use_them(byte_level):
    t = byte_level
    assert [t.prefix_id, t.suffix_id, t.middle_id, t.eot_id] == [600, 601, 602, 603]
    assert t.vocab_size == 604
    assert (t.bos_id, t.eos_id, t.begins_with_bos) == (0, 1, False)
    prefix, suffix = t.encode("def f("), t.encode("  return")
    prompt = prompts.infilling(t, "def f(", "  return")
    assert prompt == [0, 600, *prefix, 601, *suffix, 602]
    middle = t.encode_infilling(" x")
    assert prompts.infilled_middle(t, "", middle, suffix_first=True) == " x"  # no space was put
    files = (beside(t.path.removesuffix("/tokenizer.json")),)
    assert vocabulary.size(files) == 604
    assert vocabulary.ends(files) == (0, [1, 603])


def test_marks_are_not_added_twice(byte_level, tmp_path):
    with pytest.raises(ValueError, match="there already|already; there is nothing"):
        vocabulary.grow((beside(byte_level.path.removesuffix("/tokenizer.json")),), tmp_path)


@check
@hypothesis.given(text=texts, seed=hypothesis.strategies.integers(0, 100))
def test_whatever_is_allowed_spells_the_text(byte_level, text, seed):
    left, taken = byte_level.take_back(byte_level.encode(text))
    assert byte_level.decode_infilling(left) + taken == text or "\ufffd" in taken
    rng, written = np.random.default_rng(seed), b""
    allowed = byte_level.allowed_while_spelling(taken)
    while len(written) < len(taken.encode()):
        token = int(rng.choice(np.flatnonzero(allowed[len(written)])))
        written += byte_level._bytes[token]
    assert written.startswith(taken.encode())


# -- SentencePiece's, as tokenizer.json ----------------------------------------------------------


@check
@hypothesis.given(text=texts)
def test_tokenizer_json_gives_the_ids_of_tokenizer_model(both, text):
    model, other = both
    assert other.encode(text, bos=True) == model.encode(text, bos=True)
    assert other.encode_infilling(text) == model.encode_infilling(text)
    ids = model.encode(text)
    assert other.decode(ids) == model.decode(ids) == text
    assert list(other.stream(ids)) == list(model.stream(ids))
    assert other.take_back(ids) == model.take_back(ids)


def test_both_files_know_the_same_about_their_ids(both):
    model, other = both
    names = "vocab_size bos_id eos_id prefix_id suffix_id middle_id eot_id step_id".split()
    names += ["puts_space", "begins_with_bos"]
    assert [getattr(model, n) for n in names] == [getattr(other, n) for n in names]
    assert model._bytes == other._bytes
    every = range(model.vocab_size)
    assert other.decode(every, control_text=True) == model.decode(every, control_text=True)


# -- files ---------------------------------------------------------------------------------------


def test_it_travels_and_is_kept_beside_weights(byte_level, tmp_path):
    again = pickle.loads(pickle.dumps(byte_level))
    assert again.fingerprint == byte_level.fingerprint
    for name, content in byte_level.files().items():
        (tmp_path / name).write_bytes(content)
    kept = Tokenizer(beside(tmp_path))
    assert kept.fingerprint == byte_level.fingerprint
    assert (kept.bos_id, kept.eos_id) == (0, 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|start|>"}))
    assert Tokenizer(beside(tmp_path)).fingerprint != byte_level.fingerprint


def test_a_vocabulary_without_bos_begins_documents_with_eos(byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    kept = Tokenizer(tmp_path / "tokenizer.json")
    assert (kept.bos_id, kept.eos_id) == (1, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no file"),
        ("{", "not a whole tokenizer.json"),
        ("{}", "not a whole tokenizer.json"),
        (json.dumps({"model": {"vocab": {"</s>": 0}}}), "no tokenizer that the library reads"),
    ],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        Tokenizer(path)


def test_a_vocabulary_that_loses_text_or_has_no_end_is_refused(byte_level, tmp_path):
    words = library.Tokenizer(models.WordPiece({"a": 0, "</s>": 1, "[UNK]": 2}))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="others lose text"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(byte_level.files()["tokenizer.json"])
    with pytest.raises(ValueError, match="must name its eos_token"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_template_that_puts_bos_is_seen(byte_level, tmp_path):
    theirs = library.Tokenizer.from_file(byte_level.path)
    theirs.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ENDS))
    kept = Tokenizer(tmp_path / "tokenizer.json")
    assert kept.begins_with_bos and not byte_level.begins_with_bos
    assert kept.fingerprint == byte_level.fingerprint  # ids of a text are the same


def test_marks_have_the_names_of_code_llamas(tmp_path):
    content = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 4, "content": "b"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    grown = json_file.with_infilling(str(tmp_path / "tokenizer.json"))["added_tokens"][1:]
    assert [(t["id"], t["content"]) for t in grown] == list(enumerate(INFILLING_PIECES, 5))
