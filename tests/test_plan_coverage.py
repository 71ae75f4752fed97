"""Which layouts of a recipe are to be compiled again."""

from pathlib import Path

from codellama_jax.plan import cell, chips, coverage, ledger, program, store
from recipes import code_llama

CODE_7B = code_llama.stages("7b")["code"]
DOCS = Path(__file__).parents[1] / "docs"
RECIPE = code_llama.stages, code_llama.layouts


def test_cells_of_other_programs_and_cells_that_are_missing_are_named(monkeypatch):
    rows = {ledger.key(row): row for row in ledger.read(DOCS)}
    monkeypatch.setattr(program.Question, "name", lambda *_: ("of today", None))
    changed = coverage.outdated(DOCS, *RECIPE)
    assert {each.why for each in changed} <= {"missing", "other program"}
    names = {(each.size, each.stage.name, str(each.where)) for each in changed}
    assert {(row["size"], row["stage"], row["slice"]) for row in rows.values()} <= names
    monkeypatch.setattr(ledger, "find", lambda *_: {"program": "of today"})
    assert coverage.outdated(DOCS, *RECIPE) == []  # nothing kept, so nothing to estimate anew


def test_a_row_whose_kept_program_is_estimated_otherwise_today_is_named(monkeypatch):
    row, where = ledger.read(DOCS)[0], chips.Slice.parse("v5e:16x16")
    monkeypatch.setattr(program.Question, "name", lambda *_: (row["program"], None))
    monkeypatch.setattr(store, "load", lambda _: {})
    monkeypatch.setattr(cell, "plan", lambda *_: None)

    def why(now):
        monkeypatch.setattr(ledger, "row", lambda *_: now)
        return coverage.staleness("7b", CODE_7B, where, row)

    assert (why(row), why(row | {"mfu": 0.1})) == ("", "other estimate")
    assert coverage.staleness("7b", CODE_7B, where, None) == "missing"


def test_rows_of_layouts_that_the_recipe_no_longer_has_are_forgotten(tmp_path):
    (tmp_path / "pods.md").write_text("<!-- ledger -->\n<!-- /ledger -->\n")
    layout = code_llama.layouts(CODE_7B, "7b")["v5e:16x16"]
    row = ledger.find(DOCS, "7b", CODE_7B, "v5e:16x16", layout)
    ledger.record(tmp_path, row | {"layout": "layout.context=2"})
    assert coverage.forget_others(tmp_path, *RECIPE) == []  # there is no other yet
    ledger.record(tmp_path, row)
    gone = row | {"slice": "v5e:4x4"}
    ledger.record(tmp_path, gone)
    assert len(coverage.forget_others(tmp_path, *RECIPE)) == 2
    assert ledger.read(tmp_path) == [row]
