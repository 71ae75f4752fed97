"""A stage on a slice: what is refused, and that the same question is not asked twice."""

import base64
import gzip
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from schedule_fixture import HLO

from codellama_jax import config, launch
from codellama_jax.plan import arithmetic, cell, chips, program, store
from recipes import code_llama

V5E = chips.Slice.parse("v5e:16x16")
CODE_7B = code_llama.stages("7b")["code"]


def laid_out(size, name, **layout):
    return replace(code_llama.stages(size)[name], layout=config.Layout(**layout))


@pytest.mark.parametrize(
    "size, where, layout, hint",
    [
        ("7b", "v5e:16x16", {"remat": "dots"}, "layout.remat=full$"),
        ("34b", "v5e:4x4", {}, "a larger slice, such as v5e:"),
        ("70b", "v5e:16x16", {"remat": "dots"}, "layout.fsdp=.* layout.microbatches=.*"),
    ],
)
def test_a_stage_that_does_not_fit_is_told_what_would(
    tmp_path, monkeypatch, size, where, layout, hint
):
    refused = {"mesh": {"fsdp": 256}, "too_big": {"needs": 32.54, "has": 15.75}}
    monkeypatch.setattr(program, "compiled", lambda *_: refused)
    stage, where = laid_out(size, "code", **layout), chips.Slice.parse(where)
    sentence = f"32.5 GiB a device, {where} has 15.75: try {hint}"
    with pytest.raises(ValueError, match=sentence) as said:
        cell.plan(stage, where, cache=tmp_path)
    settings = [part.strip(",") for part in str(said.value).split() if part.startswith("layout.")]
    if settings:
        stage = launch.changed({"code": stage}, settings)["code"]
        assert arithmetic.divides(stage, where)
        assert arithmetic.gib(stage, where) <= arithmetic.SPARED * where.chip.hbm_gib


def test_a_block_that_vector_memory_does_not_hold_is_refused(tmp_path, monkeypatch):
    error = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 27.95M of 16.00M vmem"
    monkeypatch.setattr(program, "compiled", lambda *_: program.refusal(error))
    stage = laid_out("7b", "code", attention_block=2_048)
    with pytest.raises(ValueError, match="attention_block=2048 needs 27.95 MiB.* v4 gives 16.0"):
        cell.plan(stage, chips.Slice.parse("v4:4x4x4"), cache=tmp_path)
    assert program.refusal("INTERNAL: something else") == {}


def test_a_program_does_not_say_where_libraries_lie():
    pytest.importorskip("libtpu")
    stage = laid_out("7b", "code", microbatches=4)
    stage = replace(
        stage, model=replace(stage.model, num_layers=1, dim=512, num_heads=4, num_kv_heads=4)
    )
    lowered, _ = program.lower(program.canonical(stage), V5E)
    kernels = re.findall(r"\\22body\\22: \\22([A-Za-z0-9+/=]+)", lowered.as_text())
    assert kernels
    assert not any(b".py" in base64.b64decode(kernel) for kernel in kernels)


@pytest.mark.parametrize("layout", [{"context": 3}, {"fsdp": 64}])
def test_a_mesh_that_does_not_fill_the_slice_is_refused_with_one_that_does(layout):
    stage = laid_out("34b", "long_context", **layout)
    with pytest.raises(ValueError, match="v5e:16x16 has 256: try layout.*context=4"):
        program.check_mesh(stage, V5E)
    program.check_mesh(laid_out("34b", "long_context", context=4), V5E)


def test_rows_that_do_not_divide_are_refused():
    stage = replace(CODE_7B, layout=config.Layout(microbatches=8))
    with pytest.raises(ValueError, match="128 rows per microbatch.*256.*microbatches=4 they"):
        program.check_rows(stage, V5E, 256)
    with pytest.raises(ValueError, match="64 rows.*microbatches=1 and layout.context=4 they"):
        program.check_rows(code_llama.stages("34b")["long_context"], V5E, 256)


def test_the_same_question_is_answered_without_asking_again(tmp_path, monkeypatch):
    stage = program.canonical(CODE_7B)
    asked = store.digest(
        [config.to_json(stage), str(V5E), {}, store.versions(), store.own_code(program.SOURCES)],
    )
    places = [[x, y] for x in range(16) for y in range(16)]
    kept = {"mesh": {"fsdp": 256}, "places": places, "slices": [0] * 256, "memory": {}}
    store.save(tmp_path / "program.json", kept)
    store.save(tmp_path / "program.hlo.gz", gzip.compress(HLO.encode()))
    store.save(tmp_path / f"{asked}.alias.json", "program")
    monkeypatch.setattr(program, "lower", lambda *_: pytest.fail("asked again"))
    loop = program.compiled(stage, V5E, {}, tmp_path)["regions"][1]
    assert (loop["times"], [each["links"] for each in loop["collectives"]]) == (32, [4, 4])
    assert not list(tmp_path.glob("*.tmp"))


def test_stages_that_differ_in_numbers_alone_share_a_compile():
    stages = code_llama.stages("34b")
    assert program.canonical(stages["code"]) == program.canonical(stages["python"])
    assert program.canonical(stages["code"]) != program.canonical(stages["long_context"])


def test_importing_plans_imports_no_jax():
    code = "from codellama_jax.plan import generation, search, survey, coverage; import sys; "
    subprocess.run([sys.executable, "-c", code + "assert 'jax' not in sys.modules"], check=True)
