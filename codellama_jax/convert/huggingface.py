"""Hugging Face's folders: safetensors (or .bin) files with an index, config.json, tokenizer files.

Anything of the Llama architecture is read: tied embeddings, `rope_theta` or `rope_parameters`,
grouped heads or not. What transformers would compute differently from us is refused.
"""

import json
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.convert import (
    guard,
    hf_tokenizer,
    proof,
    pth,
    safetensor,
    settings,
    table,
    vocabulary,
)
from codellama_jax.convert.weights import Weights, copy_tokenizer, stream, tokenizer_files

# -- reading -----------------------------------------------------------------------------------


def read(folder: Path, findings: guard.Findings) -> Weights:
    """The weights in `folder`. Raises ValueError for whatever guard finds wrong with them."""
    entries = _entries(folder)
    said = settings.read(folder / "config.json")
    settings.check_numbers(said, NUMBERS, folder / "config.json")
    declared = _declared(said, findings)
    findings.settle()
    if declared.tied_embeddings and "lm_head.weight" in entries:
        _drop_tied_output(entries, findings)
    shapes = {name: entry.shape for name, entry in entries.items()}
    known = proof.read(folder)
    model = guard.settle(declared, shapes, findings, known.model if known else None)
    kinds = {entries[t.hf].dtype for t in table.tensors(model)}
    if len(kinds) > 1:
        findings.fatal(f"the tensors are of several dtypes: {', '.join(map(str, kinds))}")
    findings.settle()

    def read_tensor(tensor: table.Tensor) -> np.ndarray:
        return entries[tensor.hf].array()

    weights = Weights(model, kinds.pop(), read_tensor, tokenizer_files(folder))
    return proof.checked(weights, known, findings)


def _entries(folder: Path) -> dict[str, pth.Entry]:
    """Every tensor in the folder's files, by name."""
    for stem, kind in (("model.safetensors", safetensor), ("pytorch_model.bin", pth)):
        if (folder / stem).exists():
            return kind.index(folder / stem)
        if (folder / f"{stem}.index.json").exists():
            return _indexed(folder, settings.read(folder / f"{stem}.index.json"), kind)
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index")


def _indexed(folder: Path, content: dict, kind) -> dict[str, pth.Entry]:
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in places.values()
    ):
        raise ValueError(f"{folder}: the index has no weight_map of tensors to files")
    missing = sorted({name for name in places.values() if not (folder / name).is_file()})
    if missing:
        raise ValueError(f"{folder}: shards are missing: {', '.join(missing)}")
    entries: dict[str, pth.Entry] = {}
    for name in sorted(set(places.values())):
        for tensor, entry in kind.index(folder / name).items():
            if places.get(tensor) != name:
                place = f"in {places[tensor]}" if tensor in places else "nowhere"
                raise ValueError(
                    f"{folder / name} holds {tensor}, which the index places {place}; "
                    "are the shards of one model?"
                )
            entries[tensor] = entry
    absent = sorted(places.keys() - entries.keys())
    if absent:
        raise ValueError(f"{folder}: the index names tensors that no shard has: {absent[:3]}")
    return entries


def _drop_tied_output(entries: dict[str, pth.Entry], findings: guard.Findings) -> None:
    output, embedding = entries["lm_head.weight"], entries["model.embed_tokens.weight"]
    if output.array().tobytes() != embedding.array().tobytes():
        findings.wrong(
            "copies", "tie_word_embeddings is true, but lm_head.weight is not the embedding"
        )
    del entries["lm_head.weight"]


NUMBERS = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
}  # fmt: skip
# What must hold of config.json for our forward pass to be transformers'.
FIXED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False, True),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def _declared(said: dict, findings: guard.Findings) -> guard.Declared:
    for name, allowed in FIXED.items():
        value = said.get(name, allowed[0])
        if value not in allowed:
            only = " or ".join(map(repr, allowed))
            findings.fatal(f"config.json: {name} is {value!r}; only {only} is Llama 2")
    rope = said.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters is {rope!r}, which is no JSON object")
    settings.check_numbers(rope, {"rope_theta"}, Path("rope_parameters in config.json"))
    if rope.get("rope_type", "default") != "default":
        findings.fatal(f"config.json: rope_type {rope['rope_type']!r} is not Llama 2's")
    theta = rope.get("rope_theta", said.get("rope_theta"))
    if None not in (said.get("rope_theta"), theta) and said["rope_theta"] != theta:
        findings.wrong(
            "rope_theta",
            f"config.json names two bases: rope_theta {said['rope_theta']:g} and "
            f"rope_parameters {theta:g}",
        )
    dim, heads = said.get("hidden_size"), said.get("num_attention_heads")
    width = said.get("head_dim")
    if None not in (dim, heads, width) and width * heads != dim:
        findings.fatal(f"config.json: head_dim {width} is not hidden_size {dim} / {heads} heads")
    return guard.Declared(
        dim=dim,
        num_layers=said.get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=said.get("num_key_value_heads"),
        ffn_dim=said.get("intermediate_size"),
        vocab_size=said.get("vocab_size"),
        rope_theta=None if theta is None else float(theta),
        max_seq_len=said.get("max_position_embeddings"),
        norm_eps=said.get("rms_norm_eps"),
        tied_embeddings=said.get("tie_word_embeddings", False),
        default_eps=1e-6,
    )


# -- writing -----------------------------------------------------------------------------------


def write(weights: Weights, folder: Path, shard_bytes: int = 5_000_000_000) -> None:
    """Writes `weights` into the empty `folder`, in files of at most `shard_bytes` each.

    A tensor that is larger has a file of its own. Hugging Face's tokenizer files are copied, or
    made from tokenizer.model where there are none.
    """
    copy_tokenizer(weights.tokenizer, folder)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        hf_tokenizer.write(folder / "tokenizer.model", folder)
    shards = _plan(weights, shard_bytes)
    name = "model.safetensors"
    names = [name]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    tensors = stream(weights)
    for file_name, shard in zip(names, shards, strict=True):
        plan = [(t.hf, weights.shape(t)) for t in shard]
        with safetensor.Writer(folder / file_name, plan, weights.dtype) as file:
            for _ in shard:
                file.add(next(tensors)[1])
    if len(shards) > 1:
        places = {t.hf: n for n, shard in zip(names, shards, strict=True) for t in shard}
        _write_json(
            folder / f"{name}.index.json",
            {"metadata": {"total_size": weights.nbytes}, "weight_map": places},
        )
    bos, stops = vocabulary.ends(weights.tokenizer)
    ends = {"bos_token_id": bos, "eos_token_id": stops[0]}
    _write_json(folder / "config.json", config_json(weights.model, str(weights.dtype)) | ends)
    if not (folder / "generation_config.json").exists():
        stop = stops if len(stops) > 1 else stops[0]
        _write_json(folder / "generation_config.json", ends | {"eos_token_id": stop})


def _plan(weights: Weights, shard_bytes: int) -> list[list[table.Tensor]]:
    """The tensors, in order, cut into files."""
    shards: list[list[table.Tensor]] = [[]]
    size = 0
    for tensor in weights.order():
        nbytes = weights.size(tensor)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def config_json(model: config.Model, dtype: str) -> dict:
    """The settings in transformers' words; the rotary base in those of version 4 and of 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
