"""Which layouts of a recipe are to be compiled again."""

from pathlib import Path

from codellama_jax.plan import cell, chips, ledger, program, store, whole_ledger
from recipes import code_llama

CODE_7B = code_llama.stages("7b")["code"]
DOCS = Path(__file__).parents[1] / "docs"
RECIPE = code_llama.stages, code_llama.layouts


def test_cells_of_other_programs_and_cells_that_are_missing_are_named(monkeypatch):
    rows = {ledger.key(row): row for row in ledger.read(DOCS)}
    monkeypatch.setattr(program.Question, "name", lambda *_: ("of today", None))
    changed = whole_ledger.outdated(DOCS, *RECIPE)
    assert {each.why for each in changed} <= {"missing", "other program"}
    names = {(each.size, each.stage.name, str(each.where)) for each in changed}
    assert {(row["size"], row["stage"], row["slice"]) for row in rows.values()} <= names
    monkeypatch.setattr(ledger, "find", lambda *_: {"program": "of today"})
    assert whole_ledger.outdated(DOCS, *RECIPE) == []  # nothing kept, so nothing to estimate anew


def test_a_row_whose_kept_program_is_estimated_otherwise_today_is_named(monkeypatch):
    row, where = ledger.read(DOCS)[0], chips.Slice.parse("v5e:16x16")
    monkeypatch.setattr(program.Question, "name", lambda *_: (row["program"], None))
    monkeypatch.setattr(store, "load", lambda _: {})
    monkeypatch.setattr(cell, "plan", lambda *_: None)

    def why(now):
        monkeypatch.setattr(ledger, "row", lambda *_: now)
        return whole_ledger.staleness("7b", CODE_7B, where, row)

    assert (why(row), why(row | {"mfu": 0.1})) == ("", "other estimate")
    assert whole_ledger.staleness("7b", CODE_7B, where, None) == "missing"
