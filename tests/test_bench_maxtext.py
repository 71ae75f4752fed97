"""The comparison with MaxText, as far as it goes without it: both sides get the same cell."""

import pytest

from codellama_jax.plan import ledger
from tools import bench_maxtext

CELLS = [pytest.param(cell, id=name) for name, cell in bench_maxtext.CELLS.items()]


@pytest.mark.parametrize("cell", CELLS)
def test_both_sides_get_the_same_cell(cell):
    said = dict(setting.split("=", 1) for setting in cell.settings())
    stage = cell.stage()
    assert float(said["per_device_batch_size"]) * cell.where.chips == stage.data.rows_per_batch
    assert int(said["max_target_length"]) == stage.data.seq_len
    assert int(said["ici_context_parallelism"]) == stage.layout.context
    assert stage.model.vocab_size == 32_000
    widths = bench_maxtext.WIDTHS_34B if cell.size == "34b" else {}
    names = {
        "base_emb_dim": "dim",
        "base_mlp_dim": "ffn_dim",
        "base_num_decoder_layers": "num_layers",
    }
    for theirs, ours in names.items():
        assert widths.get(theirs, getattr(stage.model, ours)) == getattr(stage.model, ours)


def test_a_pair_is_shown_with_its_ratios():
    row = dict.fromkeys(bench_maxtext.SHOWN, 2.0) | {
        "cell": "7b-v5e", "size": "7b", "slice": "v5e:16x16", "rows": 1, "seq_len": 4_096,
        "options": True, "mesh": {"fsdp": 256}, "remat": "full",
    }  # fmt: skip
    ours = row | {"who": "here", "step_seconds": 1.5, "exposed_seconds": 0.0}
    lines = bench_maxtext.table([row | {"who": "MaxText", "exposed_seconds": 0.0}, ours])
    assert lines.splitlines()[-1].endswith("| 1.00 |  | 0.75 |")


def test_the_table_in_the_docs_is_that_of_its_rows_and_no_cell_is_slower():
    rows = ledger.read(bench_maxtext.DOCS, bench_maxtext.FILE)
    assert bench_maxtext.table(rows) in (bench_maxtext.DOCS / "pods.md").read_text()
    assert {row["cell"] for row in rows} == set(bench_maxtext.CELLS)
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (theirs["who"], ours["who"], theirs["cell"]) == ("MaxText", "here", ours["cell"])
        for name in ("temporaries_gb", "gcycles", "step_seconds"):
            assert ours[name] <= theirs[name], (ours["cell"], name)
        for name in ("arguments_gb", "peak_gb"):
            assert ours[name] <= 1.02 * theirs[name], (ours["cell"], name)
        moved = [each["gathered_gb"] + each["reduced_gb"] for each in (ours, theirs)]
        assert moved[0] <= 1.02 * moved[1], ours["cell"]
