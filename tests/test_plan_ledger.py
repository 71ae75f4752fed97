"""The ledger of compiled cells, the recipes' layouts and their twins; and real TPU compiles."""

import argparse
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from codellama_jax import config, launch
from codellama_jax.plan import cell, chips, collective, coverage, ledger, program, shown, twins
from recipes import code_llama
from tools import plan_pod

CODE_7B = code_llama.stages("7b")["code"]


def test_every_layout_of_the_recipes_divides():
    found = 0
    for size in config.SIZES:
        for stage in code_llama.stages(size).values():
            for text, layout in code_llama.layouts(stage, size).items():
                where = chips.Slice.parse(text)
                others = layout.data * layout.tensor * layout.context
                fsdp = where.devices // others if layout.fsdp == -1 else layout.fsdp
                assert others * fsdp == where.devices
                program.check_rows(replace(stage, layout=layout), where, layout.data * fsdp)
                found += 1
    assert found


def test_a_slice_takes_the_layout_of_the_recipe_or_is_refused():
    def laid_out(where):
        args = argparse.Namespace(size="7b", slice=where)
        return launch.laid_out(CODE_7B, args, code_llama.layouts).layout

    assert laid_out(None) == CODE_7B.layout
    assert laid_out("v5e:16x16") == code_llama.layouts(CODE_7B, "7b")["v5e:16x16"]
    with pytest.raises(ValueError, match="no layout for slice 'v5e:2x2', only for v4:4x4x4, v5e"):
        laid_out("v5e:2x2")


# -- the ledger ----------------------------------------------------------------------------------
DOCS = Path(__file__).parents[1] / "docs"


def test_every_layout_of_the_recipes_is_in_the_ledger_with_room_to_spare():
    rows = {
        (row["size"], row["rows"], row["seq_len"], row["slice"], row["layout"]): row
        for row in ledger.read(DOCS)
    }
    for (size, number, length), layouts in code_llama.LAYOUTS.items():
        for where, layout in layouts.items():
            row = rows[size, number, length, where, " ".join(shown.as_fields(layout))]
            assert row["headroom"] >= cell.HEADROOM
            assert row["peak_gib"] <= row["limit_gib"]


def test_the_table_in_the_docs_is_that_of_the_ledger():
    assert ledger.table(ledger.read(DOCS)) in (DOCS / "pods.md").read_text()


def test_the_table_of_generation_in_the_docs_is_that_of_its_rows():
    rows = ledger.read(DOCS, ledger.GENERATION)
    assert ledger.generation_table(rows) in (DOCS / "pods.md").read_text()
    assert {row["context"] for row in rows if row["size"] in ("7b", "34b")} >= {100_000}
    assert all(row["headroom"] >= cell.HEADROOM for row in rows)


def test_recording_a_cell_again_replaces_it(tmp_path):
    (tmp_path / "pods.md").write_text("above\n<!-- ledger -->\nold\n<!-- /ledger -->\nbelow\n")
    rows = ledger.read(DOCS)
    for row in (*rows, rows[0] | {"mfu": 0.5}):
        ledger.record(tmp_path, row)
    assert len(ledger.read(tmp_path)) == len(rows)
    text = (tmp_path / "pods.md").read_text()
    assert text.startswith("above") and text.endswith("below\n") and "50.0%" in text


def moving(row: dict, more: dict) -> dict:
    return row | {"collectives": [*row["collectives"], more | {"asynchronous": True}]}


def test_a_cell_that_got_worse_is_refused():
    row = ledger.read(DOCS)[0]
    assert "no new collectives" in ledger.compare(DOCS, row)
    with pytest.raises(ValueError, match="3.0% more than the .* recorded: find out why"):
        ledger.compare(DOCS, row | {"peak_gib": 1.03 * row["peak_gib"]})
    with pytest.raises(ValueError, match="did not have: broadcast"):
        ledger.compare(DOCS, moving(row, {"kind": "broadcast", "gigabytes": 0}))
    more = 0.03 * ledger.moved(row)
    with pytest.raises(ValueError, match="moves .* GB between chips"):
        ledger.compare(DOCS, moving(row, {"kind": "all-gather", "gigabytes": more}))
    waiting = [each | {"asynchronous": False} for each in row["collectives"]]
    with pytest.raises(ValueError, match="moves synchronously .* GB between chips"):
        ledger.compare(DOCS, row | {"collectives": waiting})
    other = row | {"jax": "another", "peak_gib": 2 * row["peak_gib"]}
    assert "not compared" in ledger.compare(DOCS, other)
    with pytest.raises(ValueError, match="has no row of 7b code on v5e:2x2"):
        ledger.compare(DOCS, row | {"slice": "v5e:2x2", "size": "7b", "stage": "code"})


# -- twins ---------------------------------------------------------------------------------------
def test_a_twin_that_needs_more_is_refused():
    old = {"peak_bytes": 1_000, "kinds": ["all-gather"], "jax": "1", "libtpu": "2"}
    assert "+0.0% of what is recorded, no new" in twins.compare("x", old, old)
    with pytest.raises(ValueError, match="the twin of x needs .* 3.0% more"):
        twins.compare("x", old | {"peak_bytes": 1_030}, old)
    with pytest.raises(ValueError, match="it did not have: all-reduce"):
        twins.compare("x", old | {"kinds": ["all-gather", "all-reduce"]}, old)
    with pytest.raises(ValueError, match="x has no twin yet"):
        twins.compare("x", old, None)


def test_every_layout_of_the_recipes_has_its_twin_recorded():
    names = {
        twins.name_of(stage, size, str(where))
        for size, stage, where in coverage.laid_out_stages(code_llama.stages, code_llama.layouts)
    }
    assert names == twins.read(DOCS).keys()


# -- the real compiler ---------------------------------------------------------------------------
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'codellama_jax[aot]'",
)
IN_CI = [row for row in ledger.read(DOCS) if row.get("in_ci")]


@pytest.fixture
def tool(tmp_path, tmp_path_factory):
    """tools/plan_pod.py with an empty cache. In a process of its own, because the compiler keeps
    the memory it took, up to 3 GB; one at a time, for the same reason."""

    def run(*arguments: str) -> str:
        places = {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}  # those of the tests are not
        done = subprocess.run(
            [sys.executable, plan_pod.__file__, *arguments],
            env=os.environ | places, capture_output=True, text=True, timeout=7_200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    with open(tmp_path_factory.getbasetemp().parent / "compiler.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield run


@pytest.mark.slow
@needs_libtpu
def test_the_twins_of_all_layouts_need_no_more_than_they_did(tool):
    said = tool("--twins").splitlines()
    assert len(said) == len(twins.read(DOCS))
    assert all("no new collectives" in line or "not compared" in line for line in said)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "row", IN_CI, ids=lambda row: f"{row['size']}-{row['stage']}-{row['slice']}"
)
def test_a_real_cell_needs_no_more_than_in_the_ledger(row, tool, tmp_path):
    which = ("--size", row["size"], "--stage", row["stage"], "--slice", row["slice"])
    report = json.loads(tool(*which, "--check", "--json"))
    where, stage = chips.Slice.parse(row["slice"]), code_llama.stages(row["size"])[row["stage"]]
    state = 12 * stage.model.num_params / (where.devices // report["layout"]["data"])
    assert report["memory"]["arguments"] * 2**30 == pytest.approx(state, rel=0.02)
    assert report["memory"]["headroom"] >= cell.HEADROOM
    assert {each["kind"] for each in report["time"]["collectives"]} <= set(collective.KINDS)
    stage = replace(stage, layout=code_llama.layouts(stage, row["size"])[row["slice"]])
    again = cell.plan(stage, where, cache=tmp_path / "codellama_jax" / "plan")
    assert json.loads(json.dumps(again)) == report  # kept: nothing is compiled here


def test_two_cells_are_compiled_by_the_tests():
    assert len(IN_CI) == 2
