r"""Code Llama: every size, branch and stage of the paper (arXiv 2308.12950).

    7B, 13B   llama2 -> code -> long_context -> instruct
              llama2 -> code_no_infilling -> python -> python_long_context
    34B       llama2 -> code -> long_context -> instruct
                        code -> python -> python_long_context
    70B       llama2 -> code -> long_context
                        code -> python -> instruct

    python recipes/code_llama.py --list
    python recipes/code_llama.py --size 7b --stage code --slice v5e:16x16 \
        --workdir gs://bucket/codellama-7b

The workdir holds the imported weights of Llama 2 with their tokenizer, and a corpus prepared for
it. Models that infill have 16 more pieces than Llama 2 (section 2.3), so theirs are other folders
(tools/convert_weights.py makes them; the weights of Llama 2 34B were never published):

    <workdir>/llama2             32,000 rows     <workdir>/corpus
    <workdir>/llama2_infilling   32,016 rows     <workdir>/corpus_infilling

"sec." cites the paper; "Llama 2" is its paper, for what this one leaves to it; "ours" marks what
neither says.
"""

from dataclasses import replace

from codellama_jax import launch
from codellama_jax.config import SIZES, B, Data, Layout, Optim, Stage
from codellama_jax.data import mix

BATCH = 1_024 * 4_096  # sec. 2.6: 4M tokens
LLAMA_2_VOCABULARY = 32_000  # without the 16 pieces for infilling

# fmt: off
PEAK_LR = {       # sec. 2.6
    "7b": 3e-4,   # "the original learning rate of the base model"; the number is Llama 2's
    "13b": 3e-4,
    "34b": 1.5e-4,
    "70b": 1.5e-4,
}
CODE_TOKENS = {"7b": 500 * B, "13b": 500 * B, "34b": 500 * B, "70b": 1_000 * B}  # sec. 2.1

LONG_BATCH = {    # sec. 2.6, in rows of 16,384 tokens
    "7b": 128 * 16_384,    # 2M
    "13b": 128 * 16_384,   # 2M
    "34b": 64 * 16_384,    # 1M
    "70b": 64 * 16_384,    # ours: as 34B
}
LONG_STEPS = {    # sec. 2.6
    ("7b", "long_context"): 3_000,
    ("7b", "python_long_context"): 10_000,
    ("13b", "long_context"): 10_000,
    ("13b", "python_long_context"): 10_000,
    ("34b", "long_context"): 11_000,
    ("34b", "python_long_context"): 11_000,
    ("70b", "long_context"): 11_000,         # ours: as 34B
}
# Compiled for these slices by tools/plan_pod.py: they fit with 5% to spare. docs/pods.md has the
# bytes and seconds, and what else was tried. Ours. In slices of cubes gradients are summed by a
# reduce-scatter over each half of the devices, and then over both halves.
LAYOUTS = {       # size, rows of a batch, row length: slice
    ("7b", 1_024, 4_096): {
        "v4:4x4x4": Layout(data=2, microbatches=8, remat="dots"),
        "v5e:16x16": Layout(data=4, fsdp=64, microbatches=4, remat="dots"),
        "v5p:4x4x4": Layout(data=2, microbatches=4, remat="dots"),
        "tpu7x:4x4x4": Layout(data=2, microbatches=2, remat="dots"),
        "2xv5e:16x16": Layout(data=8, fsdp=64, remat="attention"),
        "v6e:16x16": Layout(data=8, fsdp=32, remat="attention"),
    },
    ("7b", 128, 16_384): {
        "v5e:16x16": Layout(context=2, remat="attention"),
        "v5p:4x4x4": Layout(data=2, microbatches=2, remat="dots"),
    },
    ("7b", 32, 16_384): {
        "v5e:8x8": Layout(context=2, remat="attention"),
        "v5e:16x16": Layout(context=8, remat="dots"),
        "v5p:4x4x4": Layout(data=2, context=2, remat="dots"),
    },
    ("13b", 1_024, 4_096): {
        "v5e:16x16": Layout(data=4, fsdp=64, microbatches=4, remat="attention"),
        "v5p:4x4x4": Layout(data=2, microbatches=4, remat="dots"),
    },
    ("13b", 128, 16_384): {
        "v5e:16x16": Layout(data=4, fsdp=32, context=2),
        "v5p:4x4x4": Layout(data=2, microbatches=2, remat="dots"),
    },
    ("13b", 32, 16_384): {
        "v5e:8x8": Layout(data=2, fsdp=16, context=2),
        "v5e:16x16": Layout(data=4, context=8, remat="dots"),
        "v5p:4x4x4": Layout(data=2, context=2, remat="dots"),
    },
    ("34b", 1_024, 4_096): {
        "v5e:16x16": Layout(microbatches=2),
        "v5p:4x4x8": Layout(data=2, microbatches=4, remat="dots"),
    },
    ("34b", 64, 16_384): {
        "v5e:16x16": Layout(context=4, remat="attention"),
        "v5p:4x4x8": Layout(data=2, context=2, remat="dots"),
    },
    ("34b", 32, 16_384): {
        "v5e:8x16": Layout(context=4),
        "v5e:16x16": Layout(context=8, remat="attention"),
        "v5p:4x4x8": Layout(data=2, context=4, remat="dots"),
    },
    ("70b", 1_024, 4_096): {
        "v5e:16x16": Layout(microbatches=4),
        "v6e:16x16": Layout(microbatches=2),
        "v5p:4x4x8": Layout(data=2, microbatches=8, remat="dots"),
    },
    ("70b", 64, 16_384): {
        "v5e:16x16": Layout(context=4),
        "v6e:16x16": Layout(context=4, remat="attention"),
        "v5p:4x4x8": Layout(data=2, context=4, microbatches=2, remat="dots"),
    },
    ("70b", 128, 4_096): {
        "v6e:8x16": Layout(remat="attention"),
        "v5p:4x4x8": Layout(data=2, remat="dots"),
    },
}
# fmt: on


def layouts(stage: Stage, size: str) -> dict[str, Layout]:
    """How a stage lies on the slices of TPUs it has been compiled for, such as v5e:16x16."""
    return LAYOUTS.get((size, stage.data.rows_per_batch, stage.data.seq_len), {})


def stages(size: str) -> dict[str, Stage]:
    """The stages of one size by name, parents first (fig. 2, sec. 2.1)."""
    code = code_training(size)
    if size == "70b":
        python = specialised(code)
        rows = [code, long(code, size), python, instructed(python)]
    else:
        base = long(code, size)
        plain = code if size == "34b" else without_infilling(code)
        python = specialised(plain)
        rows = [code, base, instructed(base), plain, python, long(python, size)]
    made: dict[str, Stage] = {}
    for stage in rows:
        made[stage.name] = reading_on(stage, made.get(stage.start_from))
    return made


def reading_on(stage: Stage, before: Stage | None) -> Stage:
    """No text twice: each corpus goes on where the stage before has left it (ours)."""
    if before is None:
        return stage
    return replace(stage, data=mix.read_on(stage.data, before.data, before.steps))


def code_training(size: str) -> Stage:
    """500B tokens of code, 1T for 70B; with infilling but for 34B (sec. 2.1 to 2.3)."""
    infills = size != "34b"  # sec. 2.1
    folder = "llama2_infilling" if infills else "llama2"
    return Stage(
        name="code",
        start_from=folder,  # sec. 2.1: initialised with Llama 2
        model=SIZES[size],
        data=Data(
            mix={"code": 0.85, "code_language": 0.08, "language": 0.07},  # table 1
            seq_len=4_096,  # sec. 2.6
            batch_tokens=BATCH,
            infilling_rate=0.9 if infills else 0.0,  # sec. 2.3
            spm_rate=0.5,  # sec. 2.3
            corpus="corpus_infilling" if infills else "corpus",
            tokenizer=f"{folder}/tokenizer.model",
        ),
        optim=Optim(
            peak_lr=PEAK_LR[size],
            warmup_steps=1_000,  # sec. 2.6
            final_lr_ratio=1 / 30,  # sec. 2.6
            beta1=0.9,  # sec. 2.6
            beta2=0.95,  # sec. 2.6
            eps=1e-5,  # Llama 2, sec. 2.2
            weight_decay=0.1,  # Llama 2, sec. 2.2
            clip_norm=1.0,  # Llama 2, sec. 2.2
        ),
        steps=round(CODE_TOKENS[size] / BATCH),
    )


def without_infilling(code: Stage) -> Stage:
    """The same 500B tokens without infilling: where the Python models of 7B and 13B begin."""
    return replace(
        code,
        name="code_no_infilling",
        start_from="llama2",
        model=replace(code.model, vocab_size=LLAMA_2_VOCABULARY),
        data=replace(
            code.data, infilling_rate=0.0, corpus="corpus", tokenizer="llama2/tokenizer.model"
        ),
    )


def specialised(code: Stage) -> Stage:
    """100B tokens, most of them Python (sec. 2.1). Warm-up and cosine are not restated: as before.

    No infilling (sec. 2.1). Whether 70B starts from its infilling checkpoint is not said; there is
    no other.
    """
    return replace(
        code,
        name="python",
        start_from=code.name,
        data=replace(
            code.data,
            mix={"python": 0.75, "code": 0.10, "code_language": 0.10, "language": 0.05},  # table 1
            infilling_rate=0.0,
        ),
        optim=replace(code.optim, peak_lr=1e-4),  # sec. 2.6
        steps=round(100 * B / BATCH),  # sec. 2.1
    )


def long(before: Stage, size: str) -> Stage:
    """Long-context fine-tuning (sec. 2.4): longer rows, and a RoPE base that turns slower.

    Mix, infilling, warm-up and schedule are not published: as in the stage before (ours).
    """
    name = "python_long_context" if before.name == "python" else "long_context"
    return replace(
        before,
        name=name,
        start_from=before.name,
        model=replace(
            before.model,
            rope_theta=1e6,  # sec. 2.4: from 1e4
            max_seq_len=16_384,  # sec. 2.4: from 4,096
        ),
        data=replace(before.data, seq_len=16_384, batch_tokens=LONG_BATCH[size]),
        optim=replace(before.optim, peak_lr=2e-5),  # sec. 2.6
        steps=LONG_STEPS[size, name],
    )


def instructed(before: Stage) -> Stage:
    """About 5B tokens of dialogues and rehearsal (sec. 2.5, 2.6).

    Row length and infilling in the rehearsal are not published: as in the stage before (ours).
    """
    batch = 524_288  # sec. 2.6
    return replace(
        before,
        name="instruct",
        start_from=before.name,
        data=replace(
            before.data,
            mix={"dialogues": 0.92, "code": 0.06, "language": 0.02},  # sec. 2.5: 6% and 2%
            batch_tokens=batch,
        ),
        optim=replace(before.optim, peak_lr=2e-5),  # ours: that of Llama 2's own fine-tuning
        steps=round(5 * B / batch),  # sec. 2.6; ours for 70B
    )


if __name__ == "__main__":
    launch.main(stages, tuple(SIZES), __doc__, layouts)
