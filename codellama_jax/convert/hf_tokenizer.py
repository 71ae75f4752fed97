"""A SentencePiece model as the files that transformers loads: tokenizer.json and its settings.

The ids are SentencePiece's, and so Meta's, because three things are written down exactly:

- Merges in the order of the scores of what they make.
- The space that SentencePiece puts before a text: once at its start, never before a suffix.
- Code Llama's infilling marks as special tokens inside the text, so that
      "\u2581<PRE>" + prefix + "\u2581<SUF>" + suffix + "\u2581<MID>"            (PSM)
      "\u2581<PRE>\u2581<SUF>" + suffix + "\u2581<MID>" + prefix                  (SPM)
  are Meta's prompts, token by token. (The class that transformers has for Code Llama is wrong in
  most cases of version 5, so the files ask for the plain one that does what tokenizer.json says.)
"""

import json
from collections.abc import Sequence
from pathlib import Path

from codellama_jax.convert import vocabulary
from codellama_jax.convert.vocabulary import Piece
from codellama_jax.tokenizer import (
    INFILLING_PIECES,
    NEVER_FROM_TEXT,
    SPACE,
    STEP_PIECE,
    spm_file,
)
from codellama_jax.tokenizer.spm_file import CONTROL, NORMAL, UNKNOWN, USER_DEFINED


def write(model: Path, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for SentencePiece file `model`.

    Raises ValueError if its settings are not Llama's, which these files could not express.
    """
    pieces = vocabulary.pieces(model)
    trims = _check_settings(model, pieces)
    text = json.dumps(tokenizer_json(pieces, trims), indent=1, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "unk_token": pieces[0].text,
        "bos_token": pieces[1].text,
        "eos_token": pieces[2].text,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # what version 4's generate() takes
        "chat_template": STEP_CHAT if STEP_PIECE in {p.text for p in pieces} else INST_CHAT,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n")


# -- tokenizer.json ----------------------------------------------------------------------------


def tokenizer_json(pieces: Sequence[Piece], trims: bool = False) -> dict:
    """The content of tokenizer.json, in the terms of the tokenizers library."""
    marks = [i for i, piece in enumerate(pieces) if piece.text in INFILLING_PIECES]
    special = [i for i, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL)]
    special += [i for i, piece in enumerate(pieces) if piece.text == STEP_PIECE]
    bos = pieces[1].text
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, pieces[i].text, normalized=i in marks) for i in sorted({*special, *marks})
        ],
        "normalizer": _normalizer(bool(marks), trims),
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), _sequence("A", 0)],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[0].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in merges(pieces)],
        },
    }


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The pairs that make each piece, best score first; among equals, longest left part first.

    SentencePiece has no list of merges: it joins the neighbours that make the best-scored piece,
    and among equals the leftmost. Only runs of spaces have equal scores. There the leftmost pair
    is the one that goes on with the run that has grown longest.
    """
    ids = {p.text: i for i, p in enumerate(pieces) if p.kind == NORMAL}
    pairs = [
        (-pieces[whole].score, -cut, -len(text), text[:cut], text[cut:])
        for text, whole in ids.items()
        if text not in NEVER_FROM_TEXT
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _normalizer(has_marks: bool, trims: bool) -> dict:
    """Spaces become U+2581, and one is put where a text begins that is not empty.

    With infilling marks, a text also begins after PRE and after MID (the prefix), never after SUF.
    The pattern finds places, not characters. It is applied to the marks' names too and leaves
    them alone.
    """
    starts, not_before = r"\A", ""
    if has_marks:
        starts = rf"(?:\A|(?<={SPACE}<PRE>)|(?<={SPACE}<MID>))"
        not_before = rf"(?!{SPACE}<(?:PRE|SUF|MID|EOT)>)"
    trim = [
        {"type": "Replace", "pattern": {"Regex": rf"\A +|[ {SPACE}]+\z"}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
    ]
    return {
        "type": "Sequence",
        "normalizers": [
            *(trim if trims else []),
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            {
                "type": "Replace",
                "pattern": {"Regex": rf"{starts}{not_before}(?=[\s\S])"},
                "content": SPACE,
            },
        ],
    }


def _added(id_: int, text: str, normalized: bool) -> dict:
    return {
        "id": id_,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": True,
    }


def _special(text: str, type_id: int) -> dict:
    return {"SpecialToken": {"id": text, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


# -- the SentencePiece file --------------------------------------------------------------------


def _check_settings(path: Path, pieces: Sequence[Piece]) -> bool:
    """Whether the model removes superfluous spaces (Llama's does not).

    Raises ValueError unless it is a byte-pair model that changes no other characters.
    """
    settings = spm_file.settings(spm_file.read(str(path)))
    other = [p.text for p in pieces if p.kind == USER_DEFINED and p.text not in INFILLING_PIECES]
    problems = {
        "it is not a byte-pair model": settings.model_type != 2,
        "it has no byte fallback": not settings.byte_fallback,
        "it normalises characters": bool(settings.character_map),
        "it puts no space before a text": not settings.puts_space or settings.space_after,
        f"it has user-defined pieces ({', '.join(other[:3])})": bool(other),
        "it has not <unk>, <s>, </s> as its first pieces": [p.kind for p in pieces[:3]]
        != [UNKNOWN, CONTROL, CONTROL],
    }
    wrong = [problem for problem, is_so in problems.items() if is_so]
    if wrong:
        raise ValueError(f"{path} cannot be written as tokenizer.json: {'; '.join(wrong)}")
    return settings.trims


# -- chat --------------------------------------------------------------------------------------
# The formats of prompts.py in transformers' template language.

INST_CHAT = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant must take turns, the user first') -}}
{%- endif -%}
{%- set content = (system if loop.first else '') + message['content'] -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + content.strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}"""

STEP_CHAT = """\
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
{{- ' Source: system<step>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- ' Source: ' + message['role'] -}}
{%- if message['destination'] is defined -%}
{{- '\\nDestination: ' + message['destination'] -}}
{%- endif -%}
{{- (' \\n\\n ' + message['content'].strip() if message['content'] else '') + '<step>' -}}
{%- endfor -%}
{%- if messages[-1]['role'] == 'user' -%}
{{- ' Source: assistant\\nDestination: user \\n\\n ' -}}
{%- endif -%}"""
