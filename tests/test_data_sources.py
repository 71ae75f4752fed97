"""data/sources.py and inputs.py: which files of a tree are read, what is left out, and why."""

import os

import pytest

from codellama_jax.data import inputs, sources
from codellama_jax.data.inputs import Input


def read(folder, *, unit_bytes=10**6, file_bytes=5_000):
    return [
        item
        for unit in inputs.units(Input(str(folder)), unit_bytes=unit_bytes)
        for item in inputs.read(unit, inputs.Fields(), file_bytes=file_bytes)
    ]


def write(folder, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_files_come_with_path_and_language_in_a_fixed_order(tmp_path):
    names = ("b.rs", "a.py", "sub/c.c", "sub/README.md", "unknown.xyz")
    write(tmp_path, {name: "some text\n" for name in names})
    found = [(d.path, d.language, d.source, d.corpus) for d in read(tmp_path)]
    assert found == [
        ("a.py", "python", tmp_path.name, "code"),
        ("b.rs", "rust", tmp_path.name, "code"),
        ("sub/README.md", "prose", tmp_path.name, "language"),
        ("sub/c.c", "c", tmp_path.name, "code"),
    ]
    assert read(tmp_path, unit_bytes=1) == read(tmp_path)
    assert len(inputs.units(Input(str(tmp_path)), unit_bytes=1)) == 4


def test_texts_are_kept_as_they_are(tmp_path):
    text = "x = 1\r\n\ty = 'é 😀'\r\n\n"
    (tmp_path / "a.py").write_bytes(text.encode())
    assert [d.text for d in read(tmp_path)] == [text]


def test_what_cannot_be_read_comes_with_its_reason(tmp_path):
    (tmp_path / "latin.py").write_bytes("é = 1\n".encode("latin-1"))
    (tmp_path / "good.py").write_bytes(b"x = 1\n")
    with (tmp_path / "huge.js").open("wb") as file:
        file.truncate(50 * 1024**2)  # is not even read
    _, huge, latin = read(tmp_path)
    assert (huge.reason, huge.num_bytes) == ("larger than 5,000 bytes", 50 * 1024**2)
    assert (latin.reason, latin.path, latin.language) == ("not UTF-8", "latin.py", "python")


def test_a_file_name_need_not_be_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    assert [d.path for d in read(tmp_path)] == ["caf?.py"]


def test_three_examples_are_enough():
    tally = sources.Tally()
    for number in range(9):
        tally.add("empty", str(number), 1, "c" if number else "")
    assert tally.removed == {
        "empty": {
            "documents": 9,
            "bytes": 9,
            "examples": ["0", "1", "2"],
            "languages": {"c": 8, "unknown": 1},
        }
    }


def test_hidden_folders_installed_packages_and_links_are_not_entered(tmp_path):
    names = (".git/a.py", "node_modules/a.js", "__pycache__/a.py", "src/a.py")
    write(tmp_path, {name: "x = 1\n" for name in names})
    (tmp_path / "link.py").symlink_to(tmp_path / "src/a.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [d.path for d in read(tmp_path)] == ["src/a.py"]


def test_a_missing_and_an_empty_directory_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere is neither a file"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no source file .by ending."):
        read(tmp_path / "empty")


def test_this_python_has_code_headers_or_prose_and_no_tests():
    documents = read(sources.THIS_PYTHON, file_bytes=10**6)
    paths = {d.path for d in documents}
    assert {"json/decoder.py", "argparse.py", "topics/if"} <= paths
    assert not [p for p in paths if p.startswith(("test/", "lib2to3/")) or "site-packages" in p]
    assert documents == read(sources.THIS_PYTHON, file_bytes=10**6)


def test_the_fingerprint_of_a_tree_changes_with_its_files(tmp_path):
    def fingerprint():
        return inputs.fingerprint(inputs.units(Input(str(tmp_path)), unit_bytes=10))

    write(tmp_path, {"a.c": "int x;\n", "b.c": "int y;\n"})
    before = fingerprint()
    assert before == fingerprint()
    write(tmp_path, {"a.c": "int xyz;\n"})
    assert fingerprint() != before
