"""data/sources.py: what is read, what is left out, and what is refused."""

import os

import corpus_fixture
import pytest

from codellama_jax.data import sources
from codellama_jax.data.sources import Limits, Tally

LIMITS = Limits(file_bytes=5_000, line_chars=500)


def read(folder, tally=None):
    return sources.code_tree(folder, limits=LIMITS, tally=tally or Tally())


def test_files_come_with_path_and_language_in_a_fixed_order(tmp_path):
    for name in ("b.rs", "a.py", "sub/c.c", "sub/README.md", "unknown.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text\n")
    found = [(d.path, d.language, d.source) for d in read(tmp_path)]
    assert found == [
        ("a.py", "python", tmp_path.name),
        ("b.rs", "rust", tmp_path.name),
        ("sub/README.md", "prose", tmp_path.name),
        ("sub/c.c", "c", tmp_path.name),
    ]


def test_texts_are_kept_as_they_are(tmp_path):
    text = "x = 1\r\n\ty = 'é 😀'\r\n\n"
    (tmp_path / "a.py").write_bytes(text.encode())
    assert [d.text for d in read(tmp_path)] == [text]


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path):
    bad = {
        "nul.py": b"x = 1\0\n",
        "latin.py": "é = 1\n".encode("latin-1"),
        "empty.py": b"",
        "blank.py": b" \n\n",
        "wide.py": b"x = '" + b"a" * 600 + b"'\n",
        "large.py": b"x = 1\n" * 1_000,
        "good.py": b"x = 1\n",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    tally = Tally()
    assert [d.path for d in read(tmp_path, tally)] == ["good.py"]
    counted = {why: (e["documents"], e["examples"]) for why, e in tally.removed.items()}
    assert counted == {
        "binary (NUL bytes)": (1, ["nul.py"]),
        "not UTF-8": (1, ["latin.py"]),
        "empty": (2, ["blank.py", "empty.py"]),
        "a line longer than 500 characters": (1, ["wide.py"]),
        "larger than 5,000 bytes": (1, ["large.py"]),
    }


def test_a_single_line_of_50_megabytes_is_not_even_read(tmp_path):
    with (tmp_path / "huge.js").open("wb") as file:
        file.truncate(50 * 1024**2)
    (tmp_path / "a.js").write_text("let x = 1\n")
    tally = Tally()
    assert [d.path for d in read(tmp_path, tally)] == ["a.js"]
    assert tally.removed["larger than 5,000 bytes"]["bytes"] == 50 * 1024**2


def test_a_file_name_need_not_be_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    assert [d.path for d in read(tmp_path)] == ["caf?.py"]


def test_three_examples_are_enough():
    tally = Tally()
    for number in range(9):
        tally.add("empty", str(number), 1)
    assert tally.removed == {"empty": {"documents": 9, "bytes": 9, "examples": ["0", "1", "2"]}}


def test_hidden_folders_installed_packages_and_links_are_not_entered(tmp_path):
    for name in (".git/a.py", "node_modules/a.js", "__pycache__/a.py", "src/a.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "src/a.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [d.path for d in read(tmp_path)] == ["src/a.py"]


def test_a_missing_an_empty_and_an_undecodable_directory_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        read(tmp_path / "nowhere")
    (tmp_path / "file.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="file.py is not a directory"):
        read(tmp_path / "file.py")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty has no text .*no file with a known ending"):
        read(empty)
    (empty / "a.py").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="empty has no text that can be used .1 not UTF-8."):
        read(empty)


def test_this_python_has_code_headers_or_prose_and_no_tests():
    documents = sources.python_installation(limits=Limits(), tally=Tally())
    paths = {d.path for d in documents}
    assert {"json/decoder.py", "argparse.py", "topics/if"} <= paths
    assert not [p for p in paths if p.startswith(("test/", "lib2to3/")) or "site-packages" in p]
    assert documents == sources.python_installation(limits=Limits(), tally=Tally())


def test_a_listing_changes_with_the_files(tmp_path):
    corpus_fixture.write_tree(tmp_path, num_files=2)
    before = sources.listing([tmp_path])
    assert before == sources.listing([tmp_path])
    (tmp_path / "main.c").write_text("int x;\n")
    assert sources.listing([tmp_path]) != before
