"""What arithmetic says of layouts and slices, without the compiler."""

from dataclasses import replace
from pathlib import Path

import pytest

from codellama_jax import config
from codellama_jax.plan import arithmetic, chips, coverage, ledger, program
from recipes import code_llama

DOCS = Path(__file__).parents[1] / "docs"
CODE_7B = code_llama.stages("7b")["code"]


def test_policies_recompute_the_products_that_they_do_not_keep():
    model = config.SIZES["7b"]
    D, F, norms = 4_096, 11_008, 2 * 4_096
    assert arithmetic.recomputed(model, "full") == pytest.approx(
        4 * D * D + 2 * D * F, abs=2 * norms
    )
    assert arithmetic.recomputed(model, "attention") == D * D + 2 * D * F
    assert arithmetic.recomputed(model, "dots") == arithmetic.recomputed(model, "none") == 0


def test_arithmetic_comes_near_the_compiler_and_rather_above_it():
    for size, stage, where in coverage.laid_out_stages(code_llama.stages, code_llama.layouts):
        row = ledger.find(DOCS, size, stage, str(where), stage.layout)
        share = arithmetic.gib(stage, where) / row["peak_gib"]
        assert 0.95 <= share <= 1.3, (size, stage.name, str(where), share)


def test_the_smallest_slice_by_arithmetic_grows_with_the_model():
    sizes = [
        arithmetic.smallest(code_llama.stages(size)["code"], chips.CHIPS["v5p"]).chips
        for size in config.SIZES
    ]
    assert sizes == sorted(sizes)
    assert arithmetic.least(CODE_7B, chips.Slice.parse("v5e:3x3")) is None


@pytest.mark.parametrize("where", ["v5e:16x16", "v5p:4x4x8", "2xv5e:16x16"])
@pytest.mark.parametrize("size, name", [("7b", "code"), ("34b", "long_context")])
def test_candidates_divide_and_the_promising_come_first(size, name, where):
    where = chips.Slice.parse(where)
    stage = code_llama.stages(size)[name]
    made = [replace(stage, layout=layout) for layout in arithmetic.candidates(stage, where)]
    assert made
    for each in made:
        data, fsdp = arithmetic.ways(each, where)
        assert data * fsdp * each.layout.tensor * each.layout.context == where.devices
        assert data % where.count == 0
        program.check_rows(each, where, data * fsdp)
    times = [arithmetic.seconds(each, where) for each in made]
    assert times == sorted(times)
