"""tokenizer.json gives SentencePiece's ids, and so Meta's prompts, in the library that reads it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from convert_fixture import GQA, write

from codellama_jax import convert, prompts
from codellama_jax.convert import hf_tokenizer, vocabulary
from codellama_jax.tokenizer import Tokenizer
from codellama_jax.tokenizer.training import train

TEXTS = [
    "", " ", "  ", "Hello", " Hello", "  a", "\n", "\r\n", "\tx", "    return x", "x = 12345",
    "生活的真谛是", "☺ smile", "aaaaaaaaaaaaaaaaaaaaaaa", " " * 37 + "x", "\n\n  \n", "naïve\u00a0",
    "def add(a, b):\n    return a + b\n", "if x:\n\t\tprint('y')  # done  \n", "\x00\x7f", "▁x ▁",
]  # fmt: skip
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief"}, {"role": "user", "content": " Hi\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello! "},
        {"role": "user", "content": "Bye  now"},
    ],
]


def quiet(line):
    pass


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A vocabulary of 400 pieces with infilling marks."""
    path = tmp_path_factory.mktemp("nano") / "tokenizer.model"
    text = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print('hello', i)\n"
    train([text, *TEXTS[:-1]] * 3, 400, path)
    return path


def exported(model, folder):
    folder.mkdir(exist_ok=True)
    hf_tokenizer.write(model, folder)
    return folder


def check_ids(folder, model):
    """Compares texts, infilling prompts in both orders, and chats."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs, ours = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json"), Tokenizer(model)
    for text in [*TEXTS, *(" " * n for n in range(70)), *("x" + " " * n + "y" for n in range(40))]:
        assert theirs.encode(text).ids == ours.encode(text, bos=True), text
    if ours.eot_id is None:
        return
    for prefix in TEXTS:
        for suffix in TEXTS:
            psm = f"▁<PRE>{prefix}▁<SUF>{suffix}▁<MID>"
            spm = f"▁<PRE>▁<SUF>{suffix}▁<MID>{prefix}"
            assert theirs.encode(psm).ids == prompts.infilling(ours, prefix, suffix)
            expected = prompts.infilling(ours, prefix, suffix, suffix_first=True)
            assert theirs.encode(spm).ids == expected


def check_chats(folder, model):
    jinja2 = pytest.importorskip("jinja2")
    tokenizers = pytest.importorskip("tokenizers")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = jinja2.Environment().from_string(settings["chat_template"])
    theirs, ours = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json"), Tokenizer(model)
    for dialog in CHATS:
        text = template.render(messages=dialog, bos_token="<s>", eos_token="</s>")
        assert theirs.encode(text, add_special_tokens=False).ids == prompts.chat(ours, dialog)


def test_a_nano_vocabulary_has_the_same_ids_in_tokenizer_json(nano, tmp_path):
    check_ids(exported(nano, tmp_path), nano)
    check_chats(tmp_path, nano)


@pytest.mark.parametrize(
    "name",
    ["llama2_tokenizer", "codellama_tokenizer_rebuilt", "codellama70b_instruct_tokenizer_rebuilt"],
)
def test_metas_vocabularies_have_the_same_ids_in_tokenizer_json(name, outside_material, tmp_path):
    model = outside_material / "tokenizer" / f"{name}.model"
    check_ids(exported(model, tmp_path), model)
    check_chats(tmp_path, model)


def test_a_vocabulary_that_trims_spaces_has_the_same_ids_too(material, tmp_path):
    model = material / "tok512.model"
    check_ids(exported(model, tmp_path), model)


def test_merges_come_best_score_first_and_never_make_control_pieces(nano):
    pieces = vocabulary.pieces(nano)
    score = {piece.text: piece.score for piece in pieces}
    merged = [left + right for left, right in hf_tokenizer.merges(pieces)]
    assert [score[text] for text in merged] == sorted((score[t] for t in merged), reverse=True)
    assert "▁<PRE>" not in merged and "<s>" not in merged and len(merged) > 50


def test_generation_stops_at_the_end_of_text_of_infilling_and_of_a_message(nano, material):
    assert vocabulary.ends(()) == (1, [2])
    assert vocabulary.ends((material / "tok512.model",)) == (1, [2])
    assert vocabulary.ends((nano,)) == (1, [2, 399])


def test_a_tokenizer_of_hugging_faces_own_goes_along_as_it_is(tmp_path):
    """Here one whose ends are not Llama's, as other models of the architecture have."""
    write(tmp_path / "a", "hf", GQA)
    tokens = [{"id": i, "content": name} for i, name in ((318, "<end>"), (319, "<start>"))]
    vocab = {f"piece {i}": i for i in range(318)}
    files = {
        "tokenizer.json": {"model": {"vocab": vocab}, "added_tokens": tokens},
        "tokenizer_config.json": {"bos_token": {"content": "<start>"}, "eos_token": "<end>"},
    }
    for name, content in files.items():
        (tmp_path / "a" / name).write_text(json.dumps(content))
    (tmp_path / "a" / "generation_config.json").unlink()
    for kind, to, src, dst in (
        ("hf", "meta", "a", "m"),
        ("meta", "orbax", "m", "b"),
        ("orbax", "hf", "b", "c"),
    ):
        convert.convert((kind, tmp_path / src), (to, tmp_path / dst), say=quiet)
    for name, content in files.items():
        assert json.loads((tmp_path / "c" / name).read_text()) == content
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "c" / name).read_text())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (319, 318)


def test_metas_folder_has_tokenizer_model_alone(nano, tmp_path):
    size = Tokenizer(nano).vocab_size
    write(tmp_path / "a", "hf", replace(GQA, vocab_size=size))
    convert.convert(("hf", tmp_path / "a"), ("hf", tmp_path / "b"), tokenizer=nano, say=quiet)
    assert (tmp_path / "b/tokenizer.json").exists()
    settings = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    convert.convert(("hf", tmp_path / "b"), ("meta", tmp_path / "c"), say=quiet)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "checklist.chk", "checksums.json", "consolidated.00.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip


# -- growing -----------------------------------------------------------------------------------


def test_llama_2s_vocabulary_grows_into_code_llamas(outside_material, tmp_path):
    old = outside_material / "tokenizer" / "llama2_tokenizer.model"
    vocabulary.grow((old,), tmp_path)
    rebuilt = outside_material / "tokenizer" / "codellama_tokenizer_rebuilt.model"
    ours = [piece.text for piece in vocabulary.pieces(tmp_path / "tokenizer.model")]
    assert ours == [piece.text for piece in vocabulary.pieces(rebuilt)]
    new, reference = Tokenizer(tmp_path / "tokenizer.model"), Tokenizer(rebuilt)
    assert (new.prefix_id, new.suffix_id, new.middle_id, new.eot_id) == (32007, 32008, 32009, 32010)
    for text in [*TEXTS, "<PRE> <SUF> <MID> <EOT> <EOT><EOT> <E <M"]:
        assert new.encode(text) == reference.encode(text)


@pytest.mark.parametrize("given", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, material, given):
    """With a longer tokenizer given, and with infilling pieces added to the one that is there."""
    model = replace(GQA, vocab_size=512)
    write(tmp_path / "a", "hf", model, "float32")
    shutil.copy(material / "tok512.model", tmp_path / "a/tokenizer.model")
    if given:
        vocabulary.grow((material / "tok512.model",), tmp_path)
    tokenizer = tmp_path / "tokenizer.model" if given else None
    source, to = ("hf", tmp_path / "a"), ("orbax", tmp_path / "b")
    convert.convert(source, to, grow_vocab=True, tokenizer=tokenizer, verify=True, say=quiet)
    grown = Tokenizer(tmp_path / "b/tokenizer.model")
    assert grown.eot_id == 515
    recipe = json.loads((tmp_path / "b/0/recipe/metadata").read_text())
    assert recipe["tokenizer_fingerprint"] == grown.fingerprint

    old = convert.read_params(tmp_path / "a", say=quiet)[1]
    new_model, new = convert.read_params(tmp_path / "b", say=quiet)
    assert new_model == replace(model, vocab_size=516)
    np.testing.assert_array_equal(new["tok_embeddings"][:512], old["tok_embeddings"])
    np.testing.assert_array_equal(new["output"][:, :512], old["output"])
    for mean, rows in (
        (old["tok_embeddings"].mean(axis=0, dtype=np.float64), new["tok_embeddings"][512:]),
        (old["output"].mean(axis=1, dtype=np.float64), new["output"][:, 512:].T),
    ):
        np.testing.assert_allclose(rows, np.tile(mean, (4, 1)), rtol=1e-6)


def test_a_vocabulary_with_marks_is_not_grown_again(nano, tmp_path):
    with pytest.raises(ValueError, match="has ▁<EOT> already"):
        vocabulary.grow((nano,), tmp_path)
