"""Which slice and which layout to plan first: what is known, what arithmetic says, a search."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from codellama_jax import config
from codellama_jax.plan import cell, chips, ledger, search, survey
from recipes import code_llama
from tools import plan_pod

CODE_7B = code_llama.stages("7b")["code"]
DOCS = Path(__file__).parents[1] / "docs"


def test_without_a_slice_the_smallest_of_the_ledger_is_proposed_and_else_by_arithmetic():
    long = code_llama.stages("34b")["long_context"]
    known = [row for row in ledger.read(DOCS) if survey.is_of(row, "34b", long)]
    rows = survey.survey(long)
    fewest = min(chips.Slice.parse(row["slice"]).chips for row in known)
    assert chips.Slice.parse(survey.propose(known, rows)).chips == fewest
    by_arithmetic = survey.propose([], rows)
    assert by_arithmetic in [row["slice"] for row in rows if row["smallest"]]
    said = survey.surveyed(long, known, rows)
    assert "64 rows of 16,384" in said and all(row["slice"] in said for row in known)


def test_a_plan_starts_from_the_layout_of_the_recipe_or_one_that_fits_by_arithmetic():
    where = chips.Slice.parse("v5e:16x16")
    of_recipe = code_llama.layouts(CODE_7B, "7b")["v5e:16x16"]
    assert plan_pod.laid_out(CODE_7B, "7b", where, []).layout == of_recipe
    changed = plan_pod.laid_out(CODE_7B, "7b", where, ["layout.remat=full"])
    assert changed.layout == replace(of_recipe, remat="full")
    other = plan_pod.laid_out(CODE_7B, "7b", chips.Slice.parse("v5e:8x8"), [])
    assert other.layout.fsdp * other.layout.tensor * other.layout.context == 64
    alone = plan_pod.laid_out(CODE_7B, "7b", chips.Slice.parse("v5e:8x8"), ["layout.tensor=2"])
    assert alone.layout == replace(CODE_7B.layout, tensor=2)


def test_without_a_slice_all_that_is_known_is_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(cell, "plan", lambda stage, where: {"slice": str(where)})
    stage = code_llama.stages("34b")["long_context"]
    args = argparse.Namespace(size="34b", json=True, set=[])
    plan_pod.plan_without_slice(stage, args)
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["slice"] in [row["slice"] for row in said["compiled"]]
    assert {row["slice"].split(":")[0] for row in said["arithmetic"]} == set(chips.CHIPS)


def test_a_search_ranks_what_fits_before_what_does_not(monkeypatch):
    def planned(stage, where):
        if stage.layout.remat == "dots":
            raise ValueError("too big")
        seconds = 1.0 + stage.layout.microbatches - stage.layout.attention_block / 1e4
        layout = config.to_json(stage.layout)
        time = {"step_seconds": seconds, "mfu": 0.5}
        return {"layout": layout, "time": time, "memory": {"peak": 1.0}}

    monkeypatch.setattr(cell, "plan", planned)
    found = search.search(CODE_7B, chips.Slice.parse("v5e:16x16"), 12, quiet=True)
    times = [report["time"]["step_seconds"] for report in found if "time" in report]
    assert times == sorted(times) and len(found) == 12 + len(search.BLOCKS)
    assert found[0]["layout"]["attention_block"] == max(search.BLOCKS)
    assert ["refused" in report for report in found] == sorted("refused" in r for r in found)
