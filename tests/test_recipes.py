"""The recipes against the paper: every number typed in a second time, from the paper alone."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from codellama_jax import config, optim, sharding, state

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ("7b", "13b", "34b", "70b")
PLAIN = str(Path(__file__).parent / "material" / "tok512.model")  # without infilling pieces
LLAMA_2 = {32_000: "llama2", 32_016: "llama2_infilling"}  # imported weights, by vocabulary


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


code_llama = recipe("code_llama")
STAGES = [
    pytest.param(stage, id=f"{size}-{stage.name}")
    for size in SIZES
    for stage in code_llama.stages(size).values()
]

# fmt: off
PARAMETERS = {  # Llama 2 paper, table 1, counted from its shapes; by size and vocabulary
    ("7b", 32_000): 6_738_415_616,   ("7b", 32_016): 6_738_546_688,
    ("13b", 32_000): 13_015_864_320, ("13b", 32_016): 13_016_028_160,
    ("34b", 32_000): 33_743_970_304, ("70b", 32_016): 68_976_910_336,
}
SHAPES = {  # dim, layers, query heads, key/value heads, ffn
    "7b":  (4_096, 32, 32, 32, 11_008),
    "13b": (5_120, 40, 40, 40, 13_824),
    "34b": (8_192, 48, 64,  8, 22_016),
    "70b": (8_192, 80, 64,  8, 28_672),
}
FOUR_M, TWO_M, ONE_M = 4_194_304, 2_097_152, 1_048_576  # sec. 2.6, in whole rows
# stage                   starts from          vocab   batch    row     steps    lr      base FIM
PAPER = {
"7b": {
  "code":                ("llama2_infilling",  32_016, FOUR_M,  4_096,  119_209, 3e-4,   1e4, 0.9),
  "long_context":        ("code",              32_016, TWO_M,   16_384, 3_000,   2e-5,   1e6, 0.9),
  "instruct":            ("long_context",      32_016, 524_288, 16_384, 9_537,   2e-5,   1e6, 0.9),
  "code_no_infilling":   ("llama2",            32_000, FOUR_M,  4_096,  119_209, 3e-4,   1e4, 0.0),
  "python":              ("code_no_infilling", 32_000, FOUR_M,  4_096,  23_842,  1e-4,   1e4, 0.0),
  "python_long_context": ("python",            32_000, TWO_M,   16_384, 10_000,  2e-5,   1e6, 0.0),
},
"13b": {
  "code":                ("llama2_infilling",  32_016, FOUR_M,  4_096,  119_209, 3e-4,   1e4, 0.9),
  "long_context":        ("code",              32_016, TWO_M,   16_384, 10_000,  2e-5,   1e6, 0.9),
  "instruct":            ("long_context",      32_016, 524_288, 16_384, 9_537,   2e-5,   1e6, 0.9),
  "code_no_infilling":   ("llama2",            32_000, FOUR_M,  4_096,  119_209, 3e-4,   1e4, 0.0),
  "python":              ("code_no_infilling", 32_000, FOUR_M,  4_096,  23_842,  1e-4,   1e4, 0.0),
  "python_long_context": ("python",            32_000, TWO_M,   16_384, 10_000,  2e-5,   1e6, 0.0),
},
"34b": {
  "code":                ("llama2",            32_000, FOUR_M,  4_096,  119_209, 1.5e-4, 1e4, 0.0),
  "long_context":        ("code",              32_000, ONE_M,   16_384, 11_000,  2e-5,   1e6, 0.0),
  "instruct":            ("long_context",      32_000, 524_288, 16_384, 9_537,   2e-5,   1e6, 0.0),
  "python":              ("code",              32_000, FOUR_M,  4_096,  23_842,  1e-4,   1e4, 0.0),
  "python_long_context": ("python",            32_000, ONE_M,   16_384, 11_000,  2e-5,   1e6, 0.0),
},
"70b": {
  "code":                ("llama2_infilling",  32_016, FOUR_M,  4_096,  238_419, 1.5e-4, 1e4, 0.9),
  "long_context":        ("code",              32_016, ONE_M,   16_384, 11_000,  2e-5,   1e6, 0.9),
  "python":              ("code",              32_016, FOUR_M,  4_096,  23_842,  1e-4,   1e4, 0.0),
  "instruct":            ("python",            32_016, 524_288, 4_096,  9_537,   2e-5,   1e4, 0.0),
},
}
MIXES = {  # table 1; instruct: sec. 2.5
    "code": {"code": 0.85, "code_language": 0.08, "language": 0.07},
    "python": {"python": 0.75, "code": 0.10, "code_language": 0.10, "language": 0.05},
    "instruct": {"dialogues": 0.92, "code": 0.06, "language": 0.02},
}
TOKENS = {  # in billions, within 1%: fig. 2; long context: steps times batch, sec. 2.6
    ("7b", "code"): 500, ("13b", "code"): 500, ("34b", "code"): 500, ("70b", "code"): 1_000,
    ("7b", "code_no_infilling"): 500, ("13b", "code_no_infilling"): 500,
    ("7b", "python"): 100, ("13b", "python"): 100, ("34b", "python"): 100, ("70b", "python"): 100,
    ("7b", "instruct"): 5, ("13b", "instruct"): 5, ("34b", "instruct"): 5, ("70b", "instruct"): 5,
    ("13b", "long_context"): 21, ("7b", "python_long_context"): 21,
}
CHANGES = {  # what the paper changes from the stage before (sec. 2.1 to 2.6)
    "long_context": {"model.rope_theta", "model.max_seq_len", "data.seq_len", "data.batch_tokens",
                     "optim.peak_lr", "steps"},
    "instruct": {"data.mix", "data.batch_tokens", "optim.peak_lr", "steps"},
    "python": {"data.mix", "data.infilling_rate", "optim.peak_lr", "steps"},
    "code_no_infilling": {"data.infilling_rate", "model.vocab_size", "data.corpus",
                          "data.tokenizer"},
}
CHANGES["python_long_context"] = CHANGES["long_context"]
# fmt: on


def flat(value, prefix: str = "") -> dict:
    """{"model.dim": 4096, ...} of a stage."""
    found = {}
    for name, item in (
        config.to_json(value).items() if not isinstance(value, dict) else value.items()
    ):
        if isinstance(item, dict) and name != "mix":
            found |= flat(item, f"{prefix}{name}.")
        else:
            found[prefix + name] = item
    return found


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_has_the_numbers_of_the_paper(size):
    found = {
        stage.name: (
            stage.start_from,
            stage.model.vocab_size,
            stage.data.batch_tokens,
            stage.data.seq_len,
            stage.steps,
            stage.optim.peak_lr,
            stage.model.rope_theta,
            stage.data.infilling_rate,
        )
        for stage in code_llama.stages(size).values()
    }
    assert found == PAPER[size]


@pytest.mark.parametrize("stage", STAGES)
def test_mix_and_optimizer_are_those_of_the_paper(stage):
    name = {"code_no_infilling": "code", "python_long_context": "python", "long_context": "code"}
    assert stage.data.mix == MIXES[name.get(stage.name, stage.name)]
    assert stage.data.spm_rate == 0.5 and stage.data.line_rate == 0  # sec. 2.3: characters
    assert stage.optim == config.Optim(
        peak_lr=stage.optim.peak_lr,
        warmup_steps=1_000,  # sec. 2.6
        final_lr_ratio=1 / 30,  # sec. 2.6
        beta1=0.9,  # sec. 2.6
        beta2=0.95,  # sec. 2.6
        eps=1e-5,  # Llama 2
        weight_decay=0.1,  # Llama 2
        clip_norm=1.0,  # Llama 2
    )


def test_stages_last_as_many_tokens_as_the_paper_says():
    for (size, name), billions in TOKENS.items():
        stage = code_llama.stages(size)[name]
        assert stage.tokens == pytest.approx(billions * 1e9, rel=0.01), (size, name)


def test_the_code_stage_of_7b_has_the_learning_rates_worked_out_by_hand():
    stage = code_llama.stages("7b")["code"]
    rate = optim.learning_rate(stage.optim, stage.steps)
    for step, expected in {500: 1.5e-4, 1_000: 3e-4, 60_104: 1.55002e-4, 119_209: 1e-5}.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_shapes_and_parameter_counts_are_those_of_llama_2(stage):
    model = stage.model
    shape = (model.dim, model.num_layers, model.num_heads, model.num_kv_heads, model.ffn_dim)
    size = next(name for name, known in SHAPES.items() if known == shape)
    weights = jax.tree.leaves(state.abstract_params(model))
    counted = sum(weight.size for weight in weights)
    assert counted == model.num_params == PARAMETERS[size, model.vocab_size]
    assert model.norm_eps == 1e-5 and model.head_dim == 128 and not model.tied_embeddings
    assert model.max_seq_len == (16_384 if model.rope_theta == 1e6 else 4_096)


@pytest.mark.parametrize("size", SIZES)
def test_every_chain_of_stages_begins_with_llama_2(size):
    stages = code_llama.stages(size)
    for stage in stages.values():
        corpus, seen = stage.data.corpus, set()
        while stage.start_from in stages:
            assert stage.name not in seen
            seen.add(stage.name)
            parent = stages[stage.start_from]
            assert list(stages).index(parent.name) < list(stages).index(stage.name)
            for field in ("vocab_size", "dim", "num_layers", "num_kv_heads", "ffn_dim"):
                assert getattr(parent.model, field) == getattr(stage.model, field)
            assert parent.data.tokenizer == stage.data.tokenizer
            assert parent.data.corpus == stage.data.corpus == corpus
            common = parent.data.mix.keys() & stage.data.mix.keys()
            assert stage.data.already.keys() >= common  # read on, not again
            for name in common:
                tokens = parent.tokens * parent.data.mix[name]
                own = stage.data.already[name] - parent.data.already.get(name, 0)
                assert own == pytest.approx(tokens, rel=1e-5)
            stage = parent
        assert stage.start_from == LLAMA_2[stage.model.vocab_size]
        assert stage.data.tokenizer == f"{stage.start_from}/tokenizer.model"


@pytest.mark.parametrize("size", SIZES)
def test_a_stage_changes_only_what_the_paper_changes(size):
    stages = code_llama.stages(size)
    for name, stage in stages.items():
        before = stages["code"] if name == "code_no_infilling" else stages.get(stage.start_from)
        if before is None:
            continue
        old, new = flat(before), flat(stage)
        new = {key: value for key, value in new.items() if not key.startswith("data.already.")}
        changed = {key for key in new if new[key] != old[key]} - {"name", "start_from"}
        assert changed <= CHANGES[name], name
        same = CHANGES[name] - changed  # where the stage before had it already
        assert same <= {"data.infilling_rate", "optim.peak_lr"}, name


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_can_be_laid_out_on_eight_devices_without_memory(size):
    for stage in code_llama.stages(size).values():
        layout = replace(stage.layout, fsdp=4, tensor=2)
        mesh = sharding.make_mesh(layout)
        tx = optim.adamw(stage.optim, stage.steps)
        abstract = state.abstract_state(stage.model, tx, mesh)
        moments = 2 * sum(x.size for x in jax.tree.leaves(abstract.params))
        counters = jax.tree.leaves(abstract.opt_state)
        assert sum(x.size for x in counters) >= moments
        assert stage.data.rows_per_batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


def test_stages_survive_a_trip_through_json():
    for size in SIZES:
        for stage in code_llama.stages(size).values():
            assert config.from_json(config.Stage, config.to_json(stage)) == stage


def test_an_unknown_size_is_refused():
    with pytest.raises(KeyError):
        code_llama.stages("8b")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--stage", "codee"], "error: nano has no stage 'codee'; it has code, python, "),
        (["--set", "optim.learning_rate=1"], "error: "),
        (["--set", "data.seq_len=512"], "error: seq_len=512 is longer than "),
        (["--code-dir", "nowhere"], "error: nowhere is missing; name a directory"),
        (["--tokenizer", PLAIN], f"error: {PLAIN} has no infilling pieces; use Code Llama's, or "),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, capsys, arguments, sentence
):
    command = ["nano.py", "--workdir", str(tmp_path / "run"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        recipe("nano").main()
    said = capsys.readouterr()
    assert said.err.startswith(sentence) and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "run").exists()
