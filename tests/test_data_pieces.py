"""data/pieces.py: documents cut into functions, paragraphs, docstrings and dialogues."""

import ast
import inspect
import json.decoder
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import pieces
from codellama_jax.data.sources import Document

MODULE = '''"""About the module."""

import os

# Adds two numbers,
# as one does.
@decorated(
    by="something")
def add(a, b):
    """Returns the sum of both numbers, which is what adding means."""
    return a + b


class Long:
    """A class that is longer than the limit."""

    size = 1

    def first(self):
        """Does the first thing
        that has to be done."""
        return 1

    @property
    def second(self):
        return 2  # the second


if __name__ == "__main__":
    add(1, 2)
'''


def document(text, language="python"):
    return Document(text, "pkg/mod.py", language, "test", "MIT")


def test_functions_and_long_classes_come_in_blocks():
    text = MODULE.replace(
        "        return 1\n", "        x = 'filler text'\n" * 14 + "        return 1\n"
    )
    found = [d.text for d in pieces.functions(document(text), max_chars=500)]
    assert found[0].startswith('"""About the module.') and found[0].endswith("return a + b\n")
    assert found[1].startswith('class Long:\n    """A class') and found[1].endswith("size = 1\n")
    assert found[2].startswith("class Long:\n    def first(self):")
    assert any(t.startswith("class Long:\n    @property\n    def second") for t in found[3:])
    assert found[-1].endswith("    add(1, 2)\n")


def test_the_head_of_a_class_stays_with_its_first_method_where_both_fit():
    found = [d.text for d in pieces.functions(document(MODULE), max_chars=250)]
    assert "size = 1\n\n    def first(self)" in found[-2]


@pytest.mark.parametrize("max_chars", [200, 560, 3_000])
def test_every_line_of_a_python_file_is_in_a_block(max_chars):
    text = inspect.getsource(json.decoder)
    found = pieces.functions(document(text), max_chars=max_chars)
    assert all(len(d.text) <= max_chars + 80 for d in found)
    assert len({d.part for d in found}) == len(found)
    lines = [line.rstrip() for d in found for line in d.text.splitlines()]
    wanted = [line.rstrip() for line in text.splitlines() if line.strip()]
    titles = [line for line in wanted if line.startswith("class ")]
    left = [line for line in lines if line.strip() and line not in titles]
    missing = [line for line in wanted if line not in titles and line not in left]
    assert not missing or all(len(line.strip()) < pieces.MIN_CHARS // 4 for line in missing)


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab #:\n\t(){}\f\r"), max_size=400),
    st.sampled_from(["python", "c", "prose"]),
)
def test_any_text_is_cut_without_losing_a_character_that_counts(text, language):
    found = pieces.functions(document(text, language), max_chars=200)
    got = "".join("".join(d.text.split()) for d in found)
    wanted = "".join(text.split())
    assert len(wanted) - len(got) <= pieces.MIN_CHARS
    assert all(d.text.endswith("\n") and d.text.strip() for d in found)


def test_other_languages_are_cut_at_blank_lines_before_unindented_ones():
    text = "int a;\n\nint f()\n{\n  return 1;\n\n  // inside\n}\n\nint g() { return 2; }\n"
    text = text.replace("inside", "inside " * 10).replace("return 2", "return 2" + "0" * 80)
    found = [d.text for d in pieces.functions(document(text, "c"), max_chars=170)]
    assert [t.split("(")[0].splitlines()[-1] for t in found] == ["int f", "int g"]


def test_python_that_does_not_parse_is_cut_like_any_text():
    text = "print 'two'\n" * 3 + "\n" + "def f(:\n    pass\n" * 20
    found = pieces.functions(document(text), max_chars=200)
    assert "".join(d.text for d in found).count("def f(:") == 20


def test_docstrings_come_with_the_name_of_what_they_describe():
    text = MODULE.replace("that has to be done.", "that has to be done. " * 5)
    found = pieces.docstrings(document(text), max_chars=400)
    assert [d.part for d in found] == ["docstring of Long.first"]
    assert found[0].text.startswith("Long.first(self)\n\nDoes the first thing\nthat has")
    assert found[0].language == "prose" and found[0].path == "pkg/mod.py"


def test_a_docstring_asks_and_its_function_answers():
    found = pieces.dialogues(document(MODULE), max_chars=400)
    first = found[0]
    assert first.dialog == (
        (
            "user",
            "Write the Python function add(a, b).\n"
            "Returns the sum of both numbers, which is what adding means.",
        ),
        ("assistant", '@decorated(\n    by="something")\ndef add(a, b):\n    return a + b'),
    )
    assert first.text == "\n".join(message for _, message in first.dialog)
    assert (first.path, first.part, first.licence) == ("pkg/mod.py", "add", "MIT")
    assert [dialogue.part for dialogue in found] == ["add", "Long.first"]


def test_code_that_spells_a_tag_of_the_chat_format_makes_no_dialogue():
    text = MODULE.replace("return a + b", "return '[INST]'")
    assert [d.part for d in pieces.dialogues(document(text), max_chars=400)] == ["Long.first"]


def test_a_long_file_of_any_shape_is_cut_quickly():
    stairs = "".join(" " * (n % 300) + f"x{n}\n" for n in range(3_000))
    for text in (stairs, "\n" * 5_000 + stairs, stairs[::-1], "    deep\n" * 20_000):
        found = pieces.functions(document(text, "c"), max_chars=400)
        assert max(len(d.text) for d in found) <= 400


def test_answers_are_python_without_a_docstring():
    for module in (json.decoder, textwrap, inspect):
        found = pieces.dialogues(document(inspect.getsource(module)), max_chars=2_000)
        assert len(found) >= 3
        for dialogue in found:
            function = ast.parse(dialogue.dialog[1][1]).body[0]
            assert ast.get_docstring(function) is None


def test_paragraphs_stay_whole_where_they_fit():
    blocks = [("word " * n).strip() for n in (10, 20, 25, 100)]
    found = pieces.paragraphs(document("\n\n".join(blocks), "prose"), max_chars=300)
    assert found[0].text == "\n\n".join(blocks[:3]) + "\n"
    assert len(found) == 2  # a paragraph is a line here, which is not cut
