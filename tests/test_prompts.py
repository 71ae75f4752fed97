"""Prompts: Meta's ids, and every format undone again."""

import itertools
import json
import textwrap
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from codellama_jax import prompts
from codellama_jax.tokenizer import SPACE, STEP_PIECE, Tokenizer, spm_file, training

check = hypothesis.settings(max_examples=100, deadline=None)
snippets = [
    "\n",
    "\t",
    " ",
    "    ",
    "x = 1",
    "return",
    "é",
    "🚀",
    " <EOT>",
    " <MID>",
    "<SUF>",
    "</s>",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from(snippets)).map("".join)).map(
    lambda text: text.replace(SPACE, "")
)
plain_texts = texts.filter(lambda text: not any(tag in text for tag in prompts.TAGS))


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    training.train([Path(textwrap.__file__).read_text(encoding="utf-8")], 512, path)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def nano_step(nano, tmp_path_factory) -> Tokenizer:
    """A nano vocabulary with the piece that ends a chat message of the 70B."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    pieces, rest = spm_file.split(Path(nano.path).read_bytes())
    step = spm_file.piece(STEP_PIECE, 0.0, spm_file.USER_DEFINED)
    path.write_bytes(spm_file.join([*pieces, step], rest))
    return Tokenizer(path)


@pytest.fixture(scope="session")
def nano_without_infilling(nano, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    pieces, rest = spm_file.split(Path(nano.path).read_bytes())
    path.write_bytes(spm_file.join(pieces[:-4], rest))
    return Tokenizer(path)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def split(ids: list[int], *marks: int) -> list[list[int]]:
    """The ids between `marks`, each of which must occur once and in this order."""
    assert [token for token in ids if token in marks] == list(marks)
    ends = [ids.index(mark) for mark in marks] + [len(ids)]
    return [ids[: ends[0]], *(ids[a + 1 : b] for a, b in itertools.pairwise(ends))]


# -- documents and infilling ---------------------------------------------------------------------


@check
@hypothesis.given(text=texts)
def test_a_document_is_its_text_between_bos_and_eos(nano, text):
    assert prompts.document(nano, text) == [nano.bos_id, *nano.encode(text), nano.eos_id]


@check
@hypothesis.given(prefix=texts, middle=texts, suffix=texts)
def test_an_infilling_example_holds_its_three_parts(nano, prefix, middle, suffix):
    t = nano
    ids = prompts.infilling_example(t, prefix, middle, suffix)
    start, p, s, m, end = split(ids, t.prefix_id, t.suffix_id, t.middle_id, t.eot_id)
    assert (start, end) == ([t.bos_id], [t.eos_id])
    assert (t.decode(p), t.decode_infilling(m), t.decode_infilling(s)) == (prefix, middle, suffix)

    ids = prompts.infilling_example(t, prefix, middle, suffix, suffix_first=True)
    start, nothing, s, joined, end = split(ids, t.prefix_id, t.suffix_id, t.middle_id, t.eot_id)
    assert (start, nothing, end) == ([t.bos_id], [], [t.eos_id])
    assert (t.decode(joined), t.decode_infilling(s)) == (prefix + middle, suffix)


@check
@hypothesis.given(prefix=texts, middle=texts, suffix=texts, suffix_first=st.booleans())
def test_training_begins_with_the_prompt_where_no_token_is_cut(
    nano, prefix, middle, suffix, suffix_first
):
    prefix += "\n" if suffix_first else ""  # PSM needs no boundary; SPM does
    prompt = prompts.infilling(nano, prefix, suffix, suffix_first)
    example = prompts.infilling_example(nano, prefix, middle, suffix, suffix_first)
    *generated, eot, eos = example[len(prompt) :]
    assert example[: len(prompt)] == prompt
    assert (eot, eos) == (nano.eot_id, nano.eos_id)
    assert prompts.infilled_middle(nano, prefix, generated, suffix_first) == middle


@check
@hypothesis.given(prefix=texts, middle=texts, suffix=texts)
def test_healing_gives_back_the_middle_alone(nano, prefix, middle, suffix):
    prompt = prompts.infilling(nano, prefix, suffix, suffix_first=True)
    left, taken = nano.take_back(prompt)
    example = prompts.infilling_example(nano, prefix, middle, suffix, suffix_first=True)
    hypothesis.assume(example[: len(left)] == left)
    generated = example[len(left) : -2]
    again = prompts.infilled_middle(nano, prefix, generated, suffix_first=True, taken_back=taken)
    assert again == middle


def test_an_empty_prefix_makes_both_orders_one_prompt(nano):
    psm = prompts.infilling(nano, "", "\nx = 1\n")
    assert psm == prompts.infilling(nano, "", "\nx = 1\n", suffix_first=True)


def test_the_space_that_training_put_before_a_middle_is_dropped(nano):
    generated = nano.encode("import os\n")
    assert nano.decode_infilling(generated) == " import os\n"
    middle = prompts.infilled_middle(nano, "", generated, suffix_first=True)
    assert middle == "import os\n"
    assert prompts.infilled_middle(nano, "x =", generated, suffix_first=True) == " import os\n"
    assert prompts.infilled_middle(nano, "x =", generated) == " import os\n"


def test_generation_that_ends_before_the_taken_text_has_no_middle(nano):
    generated = nano.encode_infilling("    ")
    assert prompts.infilled_middle(nano, "x", generated, True, taken_back=" " * 8) == ""


@check
@hypothesis.given(prompt=texts, rest=texts)
def test_a_completion_keeps_the_space_it_begins_with(nano, prompt, rest):
    whole = nano.encode(prompt + rest)
    left, taken = nano.take_back(nano.encode(prompt))
    hypothesis.assume(whole[: len(left)] == left)
    assert prompts.completed(nano, prompt, whole[len(left) :], taken_back=taken) == rest


def test_a_vocabulary_without_marks_cannot_infill(nano_without_infilling):
    for build in (
        lambda t: prompts.infilling(t, "a", "b"),
        lambda t: prompts.infilling_example(t, "a", "b", "c"),
        lambda t: prompts.infilling_example(t, "a", "b", "c", suffix_first=True),
    ):
        with pytest.raises(ValueError, match="7B, 13B and 70B.*32,016 pieces.*34B"):
            build(nano_without_infilling)


# -- chat ----------------------------------------------------------------------------------------


def test_a_chat_is_one_document_per_question(nano):
    dialog = [system("Be brief."), user(" Hi "), assistant("\nHello! "), user("Bye\n")]
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello! "
    assert prompts.chat(nano, dialog) == [
        *nano.encode(first, bos=True, eos=True),
        *nano.encode("[INST] Bye [/INST]", bos=True),
    ]


def test_a_chat_of_the_70b_is_one_document(nano_step):
    t = nano_step
    dialog = [user(" Hi "), assistant("Hello!"), user("Bye")]
    parts = [
        [t.bos_id, *t.encode(" Source: system"), t.step_id],
        [*t.encode(" Source: user"), *t.encode("\n\n Hi"), t.step_id],
        [*t.encode(" Source: assistant"), *t.encode("\n\n Hello!"), t.step_id],
        [*t.encode(" Source: user"), *t.encode("\n\n Bye"), t.step_id],
        [*t.encode(" Source: assistant\nDestination: user"), *t.encode("\n\n ")],
    ]
    assert prompts.chat(t, dialog) == [token for part in parts for token in part]

    dialog[1]["destination"] = "user"
    parts[2][:-1] = t.encode(" Source: assistant\nDestination: user") + t.encode("\n\n Hello!")
    assert prompts.chat(t, dialog) == [token for part in parts for token in part]


@check
@hypothesis.given(contents=st.lists(plain_texts, min_size=2, max_size=6), with_system=st.booleans())
def test_a_chat_example_is_the_prompt_and_then_the_answer(nano, nano_step, contents, with_system):
    contents = contents[: len(contents) // 2 * 2]
    dialog = [(user, assistant)[n % 2](text) for n, text in enumerate(contents)]
    dialog = [system("Be brief.")] * with_system + dialog
    for tokenizer in (nano, nano_step):
        prompt = prompts.chat(tokenizer, dialog[:-1])
        ids, answer = prompts.chat_example(tokenizer, dialog)
        assert len(ids) == len(answer)
        assert ids[: len(prompt)] == prompt
        assert answer[len(prompt) :] == [True] * (len(ids) - len(prompt))
        end = tokenizer.eos_id if tokenizer.step_id is None else tokenizer.step_id
        written = tokenizer.decode_infilling(ids[len(prompt) : -1])
        assert ids[-1] == end
        assert written.strip() == contents[-1].strip()


def test_the_loss_is_on_every_answer_and_its_end(nano, nano_step):
    dialog = [user("Hi"), assistant("Hello!"), user("Bye"), assistant("So long")]
    for tokenizer in (nano, nano_step):
        ids, answer = prompts.chat_example(tokenizer, dialog)
        runs = [
            (is_answer, [token for token, _ in run])
            for is_answer, run in itertools.groupby(zip(ids, answer, strict=True), lambda x: x[1])
        ]
        assert [is_answer for is_answer, _ in runs] == [False, True, False, True]
        written = [tokenizer.decode_infilling(run).strip() for is_answer, run in runs if is_answer]
        assert written == ["Hello!", "So long"]
        end = tokenizer.eos_id if tokenizer.step_id is None else tokenizer.step_id
        assert [run[-1] for is_answer, run in runs if is_answer] == [end, end]


def test_text_in_a_chat_never_becomes_a_control_id(nano, nano_step):
    text = " </s> <s> <EOT> <MID>"
    ids = prompts.chat(nano, [user(text)])
    assert [token for token in ids if not nano.decode_infilling([token])] == [nano.bos_id]
    ids = prompts.chat(nano_step, [user(text)])
    control = [token for token in ids if not nano_step.decode_infilling([token])]
    assert control == [nano_step.bos_id, nano_step.step_id, nano_step.step_id]


# fmt: off
@pytest.mark.parametrize(("dialog", "message"), [
    ([], "roles of the dialog are none"),
    ([system("x")], "roles of the dialog are system;"),
    ([assistant("x")], "roles of the dialog are assistant;"),
    ([user("x"), assistant("y")], "roles of the dialog are user, assistant; .* end with user"),
    ([user("x"), user("y"), user("z")], "user, user, user; they must be user and"),
    ([user("x"), system("y"), user("z")], "after at most one system message"),
    ([system("x"), system("y"), user("z")], "after at most one system message"),
    ([{"role": "robot", "content": "x"}], "are robot;"),
    ([user("a [INST] b")], r"message 1 contains '\[INST\]'"),
    ([user("a"), assistant("[/INST]"), user("b")], r"message 2 contains '\[/INST\]'"),
    ([system("<<SYS>>"), user("b")], "message 1 contains '<<SYS>>'"),
    ([user("<</SYS>>")], "message 1 contains '<</SYS>>'"),
    ([user("<step>")], "message 1 contains '<step>'"),
    ([{"role": "user"}], r"message 1 has the keys \['role'\]"),
    ([user("x") | {"name": "me"}], r"keys \['content', 'name', 'role'\]"),
    ([user(None)], "message 1 holds None, which is not a text"),
])
# fmt: on
def test_a_dialog_out_of_order_is_refused(nano, nano_step, dialog, message):
    for tokenizer in (nano, nano_step):
        with pytest.raises(ValueError, match=message):
            prompts.chat(tokenizer, dialog)


def test_a_destination_is_refused_where_it_has_no_effect(nano):
    with pytest.raises(ValueError, match="destination.*this model's chat takes content, role"):
        prompts.chat(nano, [user("x") | {"destination": "assistant"}])


def test_an_example_ends_with_an_answer(nano):
    with pytest.raises(ValueError, match="end with assistant"):
        prompts.chat_example(nano, [user("x")])


# -- Meta's ids ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def code_llama(outside_material) -> Tokenizer:
    return Tokenizer(outside_material / "tokenizer" / "codellama_tokenizer_rebuilt.model")


@pytest.fixture(scope="session")
def code_llama_70b(outside_material) -> Tokenizer:
    return Tokenizer(
        outside_material / "tokenizer" / "codellama70b_instruct_tokenizer_rebuilt.model"
    )


# fmt: off
@pytest.mark.parametrize(("prefix", "suffix", "psm", "spm"), [
    ("def add(a, b):\n    return ", "\n",
     [1,32007,822,788,29898,29874,29892,289,1125,13,1678,736,29871,32008,13,32009],
     [1,32007,32008,13,32009,822,788,29898,29874,29892,289,1125,13,1678,736,29871]),
    ("", "\nx = 1\n",
     [1,32007,32008,13,29916,353,29871,29896,13,32009],
     [1,32007,32008,13,29916,353,29871,29896,13,32009]),
    ("x = ", "",
     [1,32007,921,353,29871,32008,32009],
     [1,32007,32008,32009,921,353,29871]),
    ("import numpy as n", " as plt\n",
     [1,32007,1053,12655,408,302,32008,408,14770,13,32009], None),
    ("    if x:\n        ", "\n    return y",
     [1,32007,268,565,921,29901,13,308,32008,13,1678,736,343,32009], None),
    ('def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n",
     [1,32007,822,3349,29918,5464,29918,294,18869,29898,29879,29901,851,29897,1599,851,29901,13,
      1678,9995,29871,32008,13,1678,736,1121,13,32009], None),
])
def test_infilling_prompts_have_metas_ids(code_llama, prefix, suffix, psm, spm):
    assert prompts.infilling(code_llama, prefix, suffix) == psm
    if spm is not None:
        assert prompts.infilling(code_llama, prefix, suffix, suffix_first=True) == spm


def test_an_infilling_example_in_metas_ids(code_llama):
    parts = ("def add(a, b):\n    ret", "urn a", " + b\n")
    assert prompts.infilling_example(code_llama, *parts) == [
        1,32007,822,788,29898,29874,29892,289,1125,13,1678,3240,32008,718,289,13,32009,595,263,
        32010,2]
    assert prompts.infilling_example(code_llama, *parts, suffix_first=True) == [
        1,32007,32008,718,289,13,32009,822,788,29898,29874,29892,289,1125,13,1678,736,263,
        32010,2]


def test_chats_have_metas_ids(code_llama):
    assert prompts.chat(code_llama, [user("Hello")]) == [
        1,518,25580,29962,15043,518,29914,25580,29962]
    assert prompts.chat(code_llama, [user("Hi"), assistant("Hello!"), user("Bye")]) == [
        1,518,25580,29962,6324,518,29914,25580,29962,15043,29991,29871,2,
        1,518,25580,29962,2648,29872,518,29914,25580,29962]
    dialog = [system("Provide answers in JavaScript"), user("Hi")]
    assert prompts.chat(code_llama, dialog) == [
        1,518,25580,29962,3532,14816,29903,6778,13,1184,29894,680,6089,297,8286,13,29966,829,14816,
        29903,6778,13,13,18567,518,29914,25580,29962]


def test_chats_of_the_70b_have_metas_ids(code_llama_70b):
    head, tail = [1,29871,7562,29901,1788], [
        32015,29871,7562,29901,1404,29871,13,13,15043,
        32015,29871,7562,29901,20255,13,14994,3381,29901,1404,29871,13,13,29871]
    assert prompts.chat(code_llama_70b, [user("Hello")]) == head + tail
    brief = [29871,13,13,1522,11473]
    assert prompts.chat(code_llama_70b, [system("Be brief"), user("Hello")]) == head + brief + tail
# fmt: on


def test_prompts_equal_those_of_metas_code(material, code_llama, code_llama_70b):
    oracle = json.loads((material / "tokenizer_meta.json").read_text(encoding="utf-8"))
    spells_added_pieces = {"special_text_space", "generics"}
    cases = oracle["codellama"]["infilling"]
    assert spells_added_pieces < {case["name"] for case in cases}
    for case in cases:
        prefix, suffix = case["prefix"], case["suffix"]
        psm = prompts.infilling(code_llama, prefix, suffix)
        spm = prompts.infilling(code_llama, prefix, suffix, suffix_first=True)
        equal = case["name"] not in spells_added_pieces
        assert ((psm, spm) == (case["psm"], case["spm"])) == equal
        assert len([token for token in psm if token >= 32_000]) == 3
    for case in oracle["chat"]:
        if "[INST]" in case["dialog"][0]["content"]:  # Meta answers with an error message
            with pytest.raises(ValueError, match="a tag of the chat format"):
                prompts.chat(code_llama, case["dialog"])
        else:
            assert prompts.chat(code_llama, case["dialog"]) == case["prompt_tokens"]
    for case in oracle["chat70b"]["cases"]:
        assert prompts.chat(code_llama_70b, case["dialog"]) == case["prompt_tokens"]


def test_only_code_llamas_vocabulary_infills(outside_material):
    llama = Tokenizer(outside_material / "tokenizer" / "llama2_tokenizer.model")
    with pytest.raises(ValueError, match="32000 pieces and no infilling marks"):
        prompts.infilling(llama, "a", "b")
