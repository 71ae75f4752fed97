"""A stage goes on from its own checkpoint and from a parent of its shape, from nothing else."""

from dataclasses import replace

import pytest
import spine_fixture as tiny

from codellama_jax import config, lineage

STAGE = tiny.stage()
RECIPE = lineage.describe(STAGE, "a" * 64, "c" * 64)


def same(stage, *, tokenizer="a" * 64, corpus="c" * 64):
    saved = RECIPE | {"model": tiny.MODEL}
    lineage.check_same_stage(saved, stage, tokenizer, "workdir/code", corpus)


def test_a_stage_goes_on_with_other_cadence_and_devices():
    same(
        replace(
            STAGE,
            layout=config.Layout(tensor=2, microbatches=4, remat="dots"),
            log_every=1,
            eval_every=2,
            eval_rows=3,
            save_every=4,
            keep_checkpoints=5,
            profile_from=6,
            data=replace(STAGE.data, workers=4, corpus="elsewhere", tokenizer="other.model"),
        )
    )


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"steps": 9}, "steps was 8, now 9"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"start_from": "llama2"}, "start_from was None, now 'llama2'"),
        ({"optim": replace(STAGE.optim, peak_lr=0.5)}, "optim.peak_lr was 0.01, now 0.5"),
        (
            {"data": replace(STAGE.data, mix={"code": 0.5, "python": 0.5})},
            "data.mix was {'code': 1.0}, now {'code': 0.5, 'python': 0.5}",
        ),
        ({"model": replace(STAGE.model, rope_theta=1e6)}, "model.rope_theta was 10000.0, now"),
    ],
)
def test_the_folder_of_another_recipe_is_refused_with_each_difference(changes, difference):
    changed = replace(STAGE, **changes)
    with pytest.raises(ValueError, match="workdir/code was made by another recipe") as error:
        same(changed)
    assert difference in str(error.value)
    both = replace(changed, data=replace(changed.data, seed=3))
    with pytest.raises(ValueError, match="data.seed was 0, now 3") as error:
        same(both)
    assert difference in str(error.value)


def test_another_corpus_or_tokenizer_is_refused():
    with pytest.raises(ValueError, match="another corpus .*cccccccccccc.*dddddddddddd"):
        same(STAGE, corpus="d" * 64)
    with pytest.raises(ValueError, match="another tokenizer .*aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        same(STAGE, tokenizer="b" * 64)


def test_a_parent_may_differ_in_rope_base_and_row_length_only():
    saved = {"model": tiny.MODEL, "tokenizer_fingerprint": "a" * 64}
    longer = replace(tiny.MODEL, rope_theta=1e6, max_seq_len=256)
    lineage.check_parent(saved, replace(STAGE, model=longer), "a" * 64, "code")
    lineage.check_parent(saved | {"tokenizer_fingerprint": None}, STAGE, "b" * 64, "code")
    with pytest.raises(
        ValueError, match="'code' cannot start from llama2: ffn_dim is 96 there, 160 here"
    ):
        wide = replace(tiny.MODEL, ffn_dim=160)
        lineage.check_parent(saved, replace(STAGE, model=wide), "a" * 64, "llama2")
    with pytest.raises(ValueError, match="llama2 was trained with another tokenizer"):
        lineage.check_parent(saved, STAGE, "b" * 64, "llama2")
