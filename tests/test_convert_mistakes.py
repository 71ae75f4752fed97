"""What a person gets wrong is said in a sentence, and nothing is written."""

import shutil

import pytest
from convert_fixture import GQA, write

from codellama_jax.convert import run


def test_a_folder_of_another_format_or_none_is_named(tmp_path):
    for kind in ("meta", "hf", "orbax"):
        write(tmp_path / kind, kind, GQA)
    for said, is_ in (("meta", "hf"), ("orbax", "hf"), ("hf", "meta"), ("orbax", "meta")):
        with pytest.raises(ValueError, match=f"in the format '{is_}', not '{said}'"):
            run.convert((said, tmp_path / is_), ("hf", tmp_path / "out"))
    for kind in ("meta", "hf", "orbax"):
        with pytest.raises(ValueError, match="there is no folder"):
            run.convert((kind, tmp_path / "lost"), ("hf", tmp_path / "out"))


def test_a_wrong_file_or_size_is_refused_in_a_sentence(tmp_path):
    folder = write(tmp_path / "hf", "hf", GQA)
    jobs = {"source": ("hf", folder), "destination": ("hf", tmp_path / "out")}
    with pytest.raises(ValueError, match="is no tokenizer; give the path of a tokenizer"):
        run.convert(**jobs, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="shard_bytes=0 must be above 0"):
        run.convert(**jobs, shard_bytes=0)
    with pytest.raises(ValueError, match="config.json cannot be made a folder"):
        run.convert(("hf", folder), ("hf", folder / "config.json" / "out"), say=lambda line: None)
    for text in ("{}", "no JSON"):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="is not a whole tokenizer.json with a vocabulary"):
            run.convert(**jobs, say=lambda line: None)


def test_a_checkpoint_that_lacks_a_part_is_refused_without_the_librarys_settings(tmp_path):
    folder = write(tmp_path / "a", "orbax", GQA)
    shutil.rmtree(folder / "0/params/layers.attention.wq")
    with pytest.raises(ValueError, match="has no whole layers.attention.wq") as error:
        run.convert(("orbax", folder), ("hf", tmp_path / "out"))
    assert "tensorstore_spec" not in str(error.value)
    (folder / "0/params/_METADATA").unlink()
    with pytest.raises(ValueError, match="_METADATA cannot be read: No such file or directory$"):
        run.convert(("orbax", folder), ("hf", tmp_path / "out"))
