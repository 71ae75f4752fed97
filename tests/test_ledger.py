"""The ledger of compiled cells, the recipes' layouts, the planning tool; and real TPU compiles."""

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from codellama_jax import chips, config, launch, ledger, plan, schedule
from recipes import code_llama

CODE_7B = code_llama.stages("7b")["code"]
TOOL = Path(__file__).parents[1] / "tools" / "plan_pod.py"


def test_every_layout_of_the_recipes_divides():
    found = 0
    for size in config.SIZES:
        for stage in code_llama.stages(size).values():
            for text, layout in code_llama.layouts(stage, size).items():
                where = chips.Slice.parse(text)
                others = layout.data * layout.tensor * layout.context
                fsdp = where.devices // others if layout.fsdp == -1 else layout.fsdp
                assert others * fsdp == where.devices
                plan.check_rows(replace(stage, layout=layout), where, layout.data * fsdp)
                found += 1
    assert found


def test_a_slice_takes_the_layout_of_the_recipe_or_is_refused():
    def laid_out(where):
        args = argparse.Namespace(size="7b", slice=where)
        return launch.laid_out(CODE_7B, args, code_llama.layouts).layout

    assert laid_out(None) == CODE_7B.layout
    assert laid_out("v5e:16x16") == code_llama.layouts(CODE_7B, "7b")["v5e:16x16"]
    with pytest.raises(ValueError, match="no layout for slice 'v5e:2x2', only for v5e:16x16, v5p"):
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
            row = rows[size, number, length, where, " ".join(plan.as_fields(layout))]
            assert row["headroom"] >= plan.HEADROOM
            assert row["peak_gib"] <= row["limit_gib"]


def test_the_table_in_the_docs_is_that_of_the_ledger():
    assert ledger.table(ledger.read(DOCS)) in (DOCS / "pods.md").read_text()


def test_recording_a_cell_again_replaces_it(tmp_path):
    (tmp_path / "pods.md").write_text("above\n<!-- ledger -->\nold\n<!-- /ledger -->\nbelow\n")
    rows = ledger.read(DOCS)
    for row in (*rows, rows[0] | {"mfu": 0.5}):
        ledger.record(tmp_path, row)
    assert len(ledger.read(tmp_path)) == len(rows)
    text = (tmp_path / "pods.md").read_text()
    assert text.startswith("above") and text.endswith("below\n") and "50.0%" in text


def test_a_cell_that_got_worse_is_refused():
    row = ledger.read(DOCS)[0]
    assert "no new collectives" in ledger.compare(DOCS, row)
    with pytest.raises(ValueError, match="3.0% more than the ledger's"):
        ledger.compare(DOCS, row | {"peak_gib": 1.03 * row["peak_gib"]})
    with pytest.raises(ValueError, match="does not: send"):
        ledger.compare(DOCS, row | {"collectives": [*row["collectives"], {"kind": "send"}]})
    with pytest.raises(ValueError, match="has no row of 7b code on v5e:2x2"):
        ledger.compare(DOCS, row | {"slice": "v5e:2x2", "size": "7b", "stage": "code"})


# -- the real compiler ---------------------------------------------------------------------------
@pytest.mark.slow
def test_a_two_layer_twin_compiles_for_tpus(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'codellama_jax[aot]'")
    where = chips.Slice.parse("v5e:2x2")
    model = replace(
        CODE_7B.model, num_layers=2, dim=512, num_heads=4, num_kv_heads=2, ffn_dim=1_024
    )
    stage = replace(
        CODE_7B,
        model=model,
        data=replace(CODE_7B.data, seq_len=512, batch_tokens=8 * 512),
        layout=config.Layout(remat="dots", loss_chunk=512),
    )
    report = plan.plan(stage, where, cache=tmp_path)
    assert report["memory"]["arguments"] * 2**30 == pytest.approx(3 * model.num_params, rel=0.02)
    assert report["memory"]["headroom"] > 0.9
    assert {row["kind"] for row in report["time"]["collectives"]} <= set(schedule.KINDS)
    assert json.loads(json.dumps(report)) == plan.plan(stage, where, cache=tmp_path)
