"""The tokenizer: nothing is lost, text stays text, and the ids are Meta's."""

import json
import pickle
import re
import textwrap
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from codellama_jax.tokenizer import INFILLING_PIECES, SPACE, Tokenizer, spm_file, training

VOCAB_SIZE = 1_024
STANDARD_LIBRARY = Path(textwrap.__file__).parent
TEXTS = [
    (STANDARD_LIBRARY / name).read_text(encoding="utf-8")
    for name in ("argparse.py", "ast.py", "inspect.py", "pathlib/__init__.py", "textwrap.py")
    if (STANDARD_LIBRARY / name).exists()
]

# Text made of what has gone wrong elsewhere, and of anything at all.
SNIPPETS = ["\n", "\r\n", "\t", " ", "    ", "def f(x):\n    return x", "é", "☺", "日本", "🚀",
            "\0", "1234", "<s>", "</s>", "<unk>", "<0x0A>", " <PRE>", "<SUF>", " <MID> ",
            " <EOT><EOT>", "<step>", " <E", " <M", "[INST]", "\ufeff", "\u200b"]  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.sampled_from(SNIPPETS)).map("".join)).map(
    lambda text: text.replace(SPACE, "")
)
check = hypothesis.settings(max_examples=150, deadline=None)


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    training.train(TEXTS, VOCAB_SIZE, path)
    return Tokenizer(path)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return sentencepiece.SentencePieceProcessor(model_file=tokenizer.path).id_to_piece(ids)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    marks = (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id)
    return {tokenizer.bos_id, tokenizer.eos_id, *marks, tokenizer.step_id} - {None}


# -- nothing is lost -----------------------------------------------------------------------------


@check
@hypothesis.given(text=texts)
def test_every_text_survives_encoding(nano, text):
    assert nano.decode(nano.encode(text)) == text
    assert nano.decode(nano.encode(text, bos=True, eos=True)) == text
    assert nano.decode_infilling(nano.encode_infilling(text)) == text


def test_the_mark_of_a_space_decodes_to_a_space(nano):
    assert nano.decode(nano.encode(f"a{SPACE}b")) == "a b"


@check
@hypothesis.given(text=texts)
def test_infilling_encoding_is_encoding_without_the_space_in_front(nano, text):
    model = Path(nano.path).read_bytes()
    model = spm_file.with_settings(model, vocab_size=VOCAB_SIZE, puts_space=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert nano.encode_infilling(text, control_text=True) == processor.encode(text)


@check
@hypothesis.given(start=texts, rest=texts)
def test_text_cut_after_a_newline_encodes_in_parts(nano, start, rest):
    start += "\n"
    assert nano.encode(start + rest) == nano.encode(start) + nano.encode_infilling(rest)
    assert nano.encode_infilling(start + rest) == (
        nano.encode_infilling(start) + nano.encode_infilling(rest)
    )


def test_only_byte_pieces_hold_newlines_and_tabs(nano):
    every = pieces(nano, list(range(nano.vocab_size)))
    assert not [piece for piece in every if "\n" in piece or "\t" in piece]
    assert pieces(nano, nano.encode_infilling("\n\t")) == ["<0x0A>", "<0x09>"]


def test_a_lone_surrogate_is_refused(nano):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        nano.encode("\ud800")


# -- text stays text -----------------------------------------------------------------------------


@check
@hypothesis.given(text=texts)
def test_no_text_becomes_a_control_id(nano, text):
    for ids in (nano.encode(text), nano.encode_infilling(text)):
        assert not control_ids(nano) & set(ids)
        assert max(ids, default=0) < nano.vocab_size - len(INFILLING_PIECES)


def test_trusted_text_may_spell_control_ids(nano):
    marks = [nano.prefix_id, nano.suffix_id, nano.middle_id, nano.eot_id]
    ids = nano.encode(" <PRE> <SUF> <MID> <EOT>", control_text=True)
    assert ids[-4:] == marks
    assert nano.decode(ids) == ""
    assert nano.decode(ids, control_text=True) == " <PRE> <SUF> <MID> <EOT>"


def test_control_ids_decode_to_nothing(nano):
    text = nano.encode("x = 1")
    ids = [1, nano.prefix_id, *text, nano.suffix_id, *nano.encode(" y"), nano.eot_id, 2]
    assert nano.decode(ids) == "x = 1  y"
    assert nano.decode([1, 2]) == nano.decode([]) == ""


def test_plain_decoding_drops_one_space_and_infilling_decoding_none(nano):
    ids = nano.encode("return")
    assert pieces(nano, ids) == [f"{SPACE}return"]
    assert (nano.decode(ids), nano.decode_infilling(ids)) == ("return", " return")


# -- streaming -----------------------------------------------------------------------------------


@check
@hypothesis.given(ids=st.lists(st.one_of(st.integers(0, VOCAB_SIZE - 1), st.integers(0, 258))))
def test_decoding_any_ids_equals_sentencepiece(nano, ids):
    processor = sentencepiece.SentencePieceProcessor(model_file=nano.path)
    assert nano.decode(ids, control_text=True) == processor.decode(ids)


@check
@hypothesis.given(text=texts)
def test_streamed_text_is_the_decoded_text(nano, text):
    shown = list(nano.stream(nano.encode(text)))
    assert "".join(shown) == text
    assert "" not in shown
    assert "".join(nano.stream(nano.encode_infilling(text), infilling=True)) == text


def test_streaming_waits_for_the_last_byte_of_a_character(nano):
    seen = []

    def ids():
        for token in nano.encode_infilling("🚀!"):
            yield token
            seen.append("".join(shown))

    shown = []
    for text in nano.stream(ids(), infilling=True):
        shown.append(text)
    assert seen == ["", "", "", "🚀", "🚀!"]


def test_half_a_character_at_the_end_is_shown_as_such(nano):
    assert nano.decode(nano.encode("🚀")[:-1]) == "\ufffd" * 3


def test_numpy_ids_are_ids(nano):
    assert nano.decode(np.array(nano.encode("x = 1"), np.int32)) == "x = 1"


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_an_id_outside_the_vocabulary_is_refused(nano, token):
    with pytest.raises(ValueError, match=f"id {token} is not one of the {VOCAB_SIZE}"):
        nano.decode([5, token])


# -- token healing -------------------------------------------------------------------------------


def walk(tokenizer: Tokenizer, text: str, ids: list[int]) -> int:
    """How many bytes of `text` stand after ids; fails if one of them was not allowed."""
    allowed, state = tokenizer.allowed_while_spelling(text), 0
    for token in ids:
        assert allowed[state, token]
        state = min(state + int(tokenizer.num_bytes[token]), len(allowed) - 1)
    return state


@check
@hypothesis.given(text=texts, cut=st.floats(0, 1))
def test_healing_leaves_the_encoding_of_the_whole_text_open(nano, text, cut):
    whole, start = nano.encode(text), nano.encode(text[: round(cut * len(text))])
    left, taken = nano.take_back(start)
    assert nano.decode_infilling(left) + taken == nano.decode_infilling(start)
    if whole[: len(left)] == left:
        spelled = walk(nano, taken, whole[len(left) :])
        assert spelled == len(taken.encode())


def test_three_tokens_taken_back_leave_what_training_saw(nano):
    rng, same, cuts = np.random.default_rng(0), 0, 500
    text = TEXTS[0][:20_000]
    whole = nano.encode(text)
    for cut in rng.integers(1, len(text), cuts):
        left, _ = nano.take_back(nano.encode(text[:cut]))
        same += left == whole[: len(left)]
    assert same >= 0.97 * cuts


@check
@hypothesis.given(text=texts, seed=st.integers(0, 99))
def test_whatever_is_allowed_spells_the_text(nano, text, seed):
    rng = np.random.default_rng(seed)
    _, taken = nano.take_back(nano.encode(text))
    allowed, state, ids = nano.allowed_while_spelling(taken), 0, []
    while state < len(allowed) - 1:
        assert allowed[state].any()
        ids.append(rng.choice(np.flatnonzero(allowed[state])))
        state = min(state + nano.num_bytes[ids[-1]], len(allowed) - 1)
    assert nano.decode_infilling(ids).startswith(taken)
    assert allowed[-1].all()
    assert not allowed[:-1, sorted({0} | control_ids(nano))].any()


def test_an_indent_may_be_cut_before_its_last_space(nano):
    ids = nano.encode("if x:\n    ")
    left, taken = nano.take_back(ids)
    assert (left, taken) == (ids[:-1], "    ")
    three, word = nano.encode("if x:\n    return")[-2:]
    assert pieces(nano, [three, word]) == [SPACE * 3, f"{SPACE}return"]
    assert walk(nano, taken, [three, word]) == 4


def test_nothing_is_taken_back_where_nothing_can_merge(nano):
    for ids in ([], [nano.bos_id], nano.encode("x\n"), nano.encode("🚀")):
        assert nano.take_back(ids) == (ids, "")
    assert nano.take_back([nano.bos_id, *nano.encode("x")]) == ([nano.bos_id], " x")


# -- training ------------------------------------------------------------------------------------


def test_the_vocabulary_is_laid_out_as_llamas(nano):
    every = pieces(nano, list(range(nano.vocab_size)))
    assert nano.vocab_size == VOCAB_SIZE
    assert every[:3] == ["<unk>", "<s>", "</s>"]
    assert every[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert every[259:274] == [SPACE * n for n in range(2, 17)]
    assert every[-4:] == list(INFILLING_PIECES)
    marks = [nano.prefix_id, nano.suffix_id, nano.middle_id, nano.eot_id]
    assert marks == list(range(VOCAB_SIZE - 4, VOCAB_SIZE))
    assert nano.step_id is None


def test_digits_stand_alone(nano):
    assert not [p for p in pieces(nano, list(range(nano.vocab_size))) if re.search(r".\d|\d.", p)
                and not p.startswith("<0x")]  # fmt: skip


def test_equal_texts_give_an_equal_vocabulary(nano, tmp_path):
    training.train(iter(TEXTS), VOCAB_SIZE, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == Path(nano.path).read_bytes()
    assert Tokenizer(tmp_path / "again.model").fingerprint == nano.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.model"]


def test_other_texts_give_another_fingerprint(nano, tmp_path):
    training.train(TEXTS[1:], VOCAB_SIZE, tmp_path / "other.model")
    assert Tokenizer(tmp_path / "other.model").fingerprint != nano.fingerprint


def test_training_is_silent(tmp_path, capfd):
    training.train(TEXTS[:1], 512, tmp_path / "tokenizer.model")
    assert capfd.readouterr() == ("", "")


def test_texts_that_spell_marks_can_be_trained_on(tmp_path):
    text = TEXTS[0] + " <PRE> <EOT> <s> </s> <unk> <0x0A> ☺☺ x☺\n" * 1_000
    training.train([text], 512, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert not control_ids(tokenizer) & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("line", [f"{SPACE}x {SPACE}", f"{SPACE}{SPACE} {SPACE}", SPACE * 20])
def test_texts_that_hold_the_mark_of_a_space_can_be_trained_on(tmp_path, line):
    training.train([TEXTS[0], line * 50], 512, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.decode(tokenizer.encode(line)) == line.replace(SPACE, " ")


def test_too_little_text_is_refused_and_writes_nothing(tmp_path):
    for some in ([], ["hello world"]):
        with pytest.raises(ValueError, match="vocab_size=1024 does not fit"):
            training.train(some, VOCAB_SIZE, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


# -- files ---------------------------------------------------------------------------------------


def test_a_tokenizer_travels_to_another_process(nano):
    again = pickle.loads(pickle.dumps(nano))
    assert again.encode("x <PRE>") == nano.encode("x <PRE>")
    assert again.fingerprint == nano.fingerprint
    assert len(pickle.dumps(nano)) < 1_000


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(ValueError, match=f"there is no file {path}"):
            Tokenizer(path)


def test_a_file_that_is_no_whole_vocabulary_is_refused(nano, tmp_path):
    whole = Path(nano.path).read_bytes()
    path = tmp_path / "tokenizer.model"
    first_piece = 2 + whole[1]
    for content in (b"", b"{}", b'{"model": 1}', b"version https://git-lfs", whole[:first_piece],
                    whole[: len(whole) // 2], whole[:-1]):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole SentencePiece model"):
            Tokenizer(path)


def test_a_file_taken_apart_and_joined_is_the_same_vocabulary(nano, tmp_path):
    pieces, rest = spm_file.split(Path(nano.path).read_bytes())
    assert len(pieces) == nano.vocab_size
    (tmp_path / "again.model").write_bytes(spm_file.join(pieces, rest))
    assert Tokenizer(tmp_path / "again.model").fingerprint == nano.fingerprint
    assert spm_file.settings(rest) == spm_file.Settings(
        model_type=2,
        space_after=False,
        byte_fallback=True,
        unknown=" ⁇ ".encode(),
        character_map=b"",
        puts_space=True,
        trims=False,
        escapes_space=True,
    )


# -- Meta's vocabularies -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama(outside_material) -> Tokenizer:
    return Tokenizer(outside_material / "tokenizer" / "llama2_tokenizer.model")


@pytest.fixture(scope="session")
def code_llama(outside_material) -> Tokenizer:
    return Tokenizer(outside_material / "tokenizer" / "codellama_tokenizer_rebuilt.model")


@pytest.fixture(scope="session")
def code_llama_70b(outside_material) -> Tokenizer:
    return Tokenizer(
        outside_material / "tokenizer" / "codellama70b_instruct_tokenizer_rebuilt.model"
    )


def special_ids(tokenizer: Tokenizer) -> tuple:
    t = tokenizer
    return t.bos_id, t.eos_id, t.prefix_id, t.suffix_id, t.middle_id, t.eot_id, t.step_id


def test_metas_vocabularies_have_the_published_ids_and_the_nano_their_settings(
    llama, code_llama, code_llama_70b, nano
):
    assert special_ids(llama) == (1, 2, None, None, None, None, None)
    assert special_ids(code_llama) == (1, 2, 32_007, 32_008, 32_009, 32_010, None)
    assert special_ids(code_llama_70b) == (1, 2, 32_007, 32_008, 32_009, 32_010, 32_015)
    assert (llama.vocab_size, code_llama.vocab_size) == (32_000, 32_016)
    assert len({t.fingerprint for t in (llama, code_llama, code_llama_70b)}) == 3
    settings = [spm_file.settings(spm_file.read(t.path)) for t in (llama, code_llama)]
    assert settings == [spm_file.settings(spm_file.read(nano.path))] * 2


# fmt: off
@pytest.mark.parametrize(("text", "ids", "infilling_ids"), [
    ("Hello", [15043], [10994]),
    (" Hello", [29871, 15043], [15043]),
    ("", [], []),
    (" ", [259], [29871]),
    ("  a", [259, 263], [29871, 263]),
    ("\n", [29871, 13], [13]),
    ("\r\n", [6756, 13], [30004, 13]),
    ("\tx", [29871, 12, 29916], [12, 29916]),
    ("    return x", [268, 736, 921], [1678, 736, 921]),
    ("x = 12345", [921, 353, 29871, 29896, 29906, 29941, 29946, 29945], None),
    ("生活的真谛是", [29871, 30486, 31704, 30210, 30848, 235, 179, 158, 30392], None),
    ("This is a test", [910, 338, 263, 1243], None),
])
# fmt: on
def test_ids_of_known_texts(llama, code_llama, text, ids, infilling_ids):
    for tokenizer in (llama, code_llama):
        assert tokenizer.encode(text) == ids
        if infilling_ids is not None:
            assert tokenizer.encode_infilling(text) == infilling_ids


def test_the_space_of_a_first_piece(llama):
    assert (llama.decode([15154]), llama.decode_infilling([15154])) == ("Remove", " Remove")


def oracle_texts(material, name: str) -> list[dict]:
    return json.loads((material / "tokenizer_meta.json").read_text(encoding="utf-8"))[name]["texts"]


def test_trusted_text_has_the_ids_of_metas_code(material, llama, code_llama):
    for name, tokenizer in (("llama2", llama), ("codellama", code_llama)):
        for case in oracle_texts(material, name):
            text, ids, infilling_ids = case["text"], case["ids"], case["infill_ids"]
            assert tokenizer.encode(text, control_text=True) == ids
            assert tokenizer.encode(text, True, True, control_text=True) == case["ids_bos_eos"]
            assert tokenizer.encode_infilling(text, control_text=True) == infilling_ids
            assert tokenizer.decode(ids, control_text=True) == case["decoded"]
            decoded = tokenizer.decode_infilling(infilling_ids, control_text=True)
            assert decoded == case["infill_decoded"]


def test_text_has_the_ids_it_has_without_the_added_pieces(material, code_llama):
    # Llama 2's vocabulary is Code Llama's without the 16, so its ids are the base's.
    for case in oracle_texts(material, "llama2"):
        assert code_llama.encode(case["text"]) == case["ids"]
        assert code_llama.encode_infilling(case["text"]) == case["infill_ids"]


def test_code_llamas_building_pieces_are_text_when_a_model_writes_them(code_llama):
    ids = code_llama.encode("static <E> void", control_text=True)
    assert 32_005 in ids
    assert code_llama.decode(ids) == "static <E> void"


@check
@hypothesis.given(text=texts, rest=texts)
def test_metas_vocabulary_keeps_the_same_promises(code_llama, code_llama_70b, text, rest):
    for tokenizer in (code_llama, code_llama_70b):
        ids = tokenizer.encode(text + "\n" + rest)
        assert tokenizer.decode(ids) == text + "\n" + rest
        assert ids == tokenizer.encode(text + "\n") + tokenizer.encode_infilling(rest)
        assert not {0, 1, 2, *range(32_000, 32_016)} & set(ids)
        assert tokenizer.decode_infilling(tokenizer.encode_infilling(text)) == text


@check
@hypothesis.given(ids=st.lists(st.one_of(st.integers(0, 32_015), st.integers(0, 258))))
def test_decoding_any_of_metas_ids_equals_sentencepiece(code_llama, ids):
    processor = sentencepiece.SentencePieceProcessor(model_file=code_llama.path)
    assert code_llama.decode(ids, control_text=True) == processor.decode(ids)
