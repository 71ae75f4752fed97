"""Meta's folders: consolidated.NN.pth, params.json, tokenizer.model, checklist.chk.

Each of the files is one model-parallel shard of every matrix, cut along the axis that the table
names; norms are whole in each.
"""

import hashlib
import json
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.convert import guard, proof, pth, settings, table
from codellama_jax.convert.weights import Weights, copy_tokenizer, stream, tokenizer_files

PARAMS = {  # what Meta's reference code accepts, and what of it says something about the model
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "max_batch_size", "max_seq_len",
}  # fmt: skip


# -- reading -----------------------------------------------------------------------------------


def read(folder: Path, findings: guard.Findings) -> Weights:
    """The weights in `folder`. Raises ValueError for whatever guard finds wrong with them."""
    shards = [pth.index(path) for path in _shard_paths(folder)]
    declared = _declared(folder / "params.json", findings)
    meta_to_hf = _names(shards[0])
    for i, shard in enumerate(shards[1:], 1):
        if shard.keys() != shards[0].keys():
            odd = sorted(shard.keys() ^ shards[0].keys())
            findings.fatal(f"consolidated.{i:02d}.pth has not the tensors of .00: {odd[:3]}")
    findings.settle()
    shapes = {}
    for name, (hf, row) in meta_to_hf.items():
        shapes[hf] = _whole_shape([shard[name] for shard in shards], name, row, findings)
    _check_head_width(shards[0], declared, findings)
    _check_number(shards, findings)
    findings.settle()
    known = proof.read(folder)
    model = guard.settle(declared, shapes, findings, known.model if known else None)
    _check_copies(shards, findings)
    kinds = {shard[n].dtype for shard in shards for n, (_, row) in meta_to_hf.items() if row}
    if len(kinds) > 1:
        findings.fatal(f"the tensors are of several dtypes: {', '.join(map(str, kinds))}")
    findings.settle()
    lengths = table.sizes(model)

    def read_tensor(tensor: table.Tensor) -> np.ndarray:
        row, parts = tensor.row, [shard[tensor.meta].array() for shard in shards]
        whole = parts[0] if row.split is None else _joined(parts, row.split)
        return table.rearrange(whole, row.meta_axes, row.hf_axes, lengths)

    weights = Weights(model, kinds.pop(), read_tensor, _tokenizer(folder))
    return proof.checked(weights, known, findings)


def _joined(parts: list[np.ndarray], axis: int) -> np.ndarray:
    """As numpy.concatenate."""
    if len(parts) == 1:
        return parts[0]
    shape = [n * len(parts) if i == axis else n for i, n in enumerate(parts[0].shape)]
    whole = np.empty(tuple(shape), parts[0].dtype)
    bits = f"u{whole.itemsize}"
    for part, place in zip(parts, np.split(whole, len(parts), axis), strict=True):
        np.copyto(place.view(bits), part.view(bits))
    return whole


def _shard_paths(folder: Path) -> list[Path]:
    found = {
        int(m[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if not found:
        raise ValueError(f"{folder} has no consolidated.00.pth; is it a folder of Meta's weights?")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing or len(found) not in (1, 2, 4, 8):
        names = ", ".join(f"consolidated.{i:02d}.pth" for i in missing) or "some"
        raise ValueError(f"{folder} has {len(found)} shards: {names} missing (1, 2, 4 or 8 needed)")
    return [found[i] for i in sorted(found)]


def _names(shard: dict[str, pth.Entry]) -> dict[str, tuple[str, table.Row | None]]:
    """Meta's name -> Hugging Face's and the row of the table; a stranger keeps its name."""
    patterns = [
        (re.compile(re.escape(row.meta).replace(r"\{\}", r"(\d+)")), row) for row in table.TABLE
    ]
    names = {}
    for name in shard:
        row, layer = None, None
        for pattern, row_ in patterns:
            if match := pattern.fullmatch(name):
                row, layer = row_, match[1] if row_.stacked else None
        names[name] = (row.hf.format(layer) if row else name, row)
    return names


def _whole_shape(parts, name, row, findings) -> tuple[int, ...]:
    """The shape of the tensor whose shards are `parts`."""
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        findings.fatal(f"{name} has shapes {sorted(shapes)} in the shards; are they of one model?")
    shape = list(parts[0].shape)
    if row and row.split is not None and row.split < len(shape):
        shape[row.split] *= len(parts)
    return tuple(shape)


def _check_copies(shards: list[dict[str, pth.Entry]], findings: guard.Findings) -> None:
    """Shards of two models (of Code Llama and its Instruct, say) differ in their norms.

    And no two shards hold the same part of a matrix.
    """
    rows = {name: row for name, (_, row) in _names(shards[0]).items() if row}
    matrix = next(name for name, row in rows.items() if row.ours == "layers.attention.wk")
    digests = [hashlib.sha256(shard[matrix].array().tobytes()).digest() for shard in shards]
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            first = digests.index(digest)
            findings.wrong(
                "copies", f"consolidated.{i:02d}.pth is a copy of consolidated.{first:02d}.pth"
            )
    names = [name for name, row in rows.items() if row.split is None]
    for i, shard in enumerate(shards[1:], 1):
        for name in names:
            if shard[name].array().tobytes() != shards[0][name].array().tobytes():
                findings.wrong(
                    "copies",
                    f"{name} differs in consolidated.00.pth and consolidated.{i:02d}.pth; "
                    "are the shards of one model?",
                )
                return


def _check_number(shards: list[dict[str, pth.Entry]], findings: guard.Findings) -> None:
    """Norms are whole in each shard, and so tell how wide all shards together must be."""
    norm, part = (shards[0].get(name) for name in ("norm.weight", "tok_embeddings.weight"))
    if norm is None or part is None or len(norm.shape) != 1 or len(part.shape) != 2:
        return  # found wrong elsewhere
    wanted, found = norm.shape[0], part.shape[1] * len(shards)
    if wanted != found:
        findings.fatal(
            f"the {len(shards)} shards make a width of {found:,}, but norm.weight has {wanted:,}; "
            "is a shard missing?"
        )


def _check_head_width(shard, declared: guard.Declared, findings: guard.Findings) -> None:
    """rope.freqs, where a file has it, is the one trace of the head width in the tensors."""
    freqs = shard.get("rope.freqs")
    if freqs is None or None in (declared.dim, declared.num_heads):
        return
    if freqs.shape != (declared.dim // declared.num_heads // 2,):
        findings.wrong(
            "sizes",
            f"n_heads {declared.num_heads} makes heads {declared.dim // declared.num_heads} wide, "
            f"but rope.freqs is for {2 * freqs.shape[0]}",
        )


def _declared(path: Path, findings: guard.Findings) -> guard.Declared:
    params = settings.read(path)
    settings.check_numbers(params, PARAMS, path)
    unknown = sorted(set(params) - PARAMS)
    if unknown:
        findings.wrong("extra", f"{path.name} has settings no Llama 2 has: {', '.join(unknown)}")
    dim, multiplier = params.get("dim"), params.get("ffn_dim_multiplier")
    theta = params.get("rope_theta")
    return guard.Declared(
        dim=dim,
        num_layers=params.get("n_layers"),
        num_heads=params.get("n_heads"),
        num_kv_heads=params.get("n_kv_heads"),
        ffn_dim=dim and ffn_dim(dim, params.get("multiple_of", 256), multiplier),
        vocab_size=params.get("vocab_size"),
        rope_theta=None if theta is None else float(theta),
        norm_eps=params.get("norm_eps"),
        code_llama=multiplier == 1.0,
        default_eps=1e-5,
    )


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of 4 dim, times the multiplier, up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _tokenizer(folder: Path) -> tuple[Path, ...]:
    """tokenizer.model in the folder, or above it, where Llama 2's download puts it.

    A model that has none, which Meta's never are, keeps the files it came with.
    """
    places = (folder / "tokenizer.model", folder.parent / "tokenizer.model")
    return tuple(path for path in places if path.exists())[:1] or tokenizer_files(folder)


def check_checklist(folder: Path, findings: guard.Findings) -> None:
    """Compares the MD5 of every file that checklist.chk names; reads them all."""
    path = folder / "checklist.chk"
    if not path.exists():
        return
    lines = [line.split(maxsplit=1) for line in path.read_text(errors="replace").splitlines()]
    named = {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}
    for shard in _shard_paths(folder):
        if shard.name not in named:
            findings.wrong("checklist", f"checklist.chk does not name {shard.name}")
    for name, md5 in named.items():
        file = folder / name
        if "/" in name or not file.is_file():
            continue
        with open(file, "rb") as stream_:
            if hashlib.file_digest(stream_, "md5").hexdigest() != md5:
                findings.wrong("checklist", f"{file.name} has not the MD5 in checklist.chk")


# -- writing -----------------------------------------------------------------------------------


def write(weights: Weights, folder: Path, shards: int = 1) -> None:
    """Writes `weights` into the empty `folder` as `shards` model-parallel files.

    Raises ValueError if an axis that is cut does not divide by `shards`.
    """
    model = weights.model
    lengths = table.sizes(model)
    check_shards(model, shards)
    models = tuple(path for path in weights.tokenizer if path.suffix == ".model")
    copy_tokenizer(models or weights.tokenizer, folder)
    plan = [
        (t.meta, _part_shape(table.shape(t.row.meta_axes, lengths), t.row.split, shards))
        for t in weights.order()
    ]
    names = [f"consolidated.{i:02d}.pth" for i in range(shards)]
    with ExitStack() as stack:
        files = [
            stack.enter_context(pth.Writer(folder / name, plan, weights.dtype)) for name in names
        ]
        for tensor, array in stream(weights, "meta_axes"):
            parts = [array] * shards
            if tensor.row.split is not None:
                parts = np.split(array, shards, axis=tensor.row.split)
            for file, part in zip(files, parts, strict=True):
                file.add(part)
    (folder / "params.json").write_text(json.dumps(params_json(model)) + "\n")
    sums = {name: file.md5 for name, file in zip(names, files, strict=True)}
    for name in ("params.json", "tokenizer.model"):
        if (folder / name).exists():
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    lines = "".join(f"{md5}  {name}\n" for name, md5 in sums.items())
    (folder / "checklist.chk").write_text(lines)


def check_shards(model: config.Model, shards: int) -> None:
    """Raises ValueError unless every axis that Meta's shards cut divides by `shards`."""
    if shards not in (1, 2, 4, 8):
        raise ValueError(f"shards={shards} is not 1, 2, 4 or 8")
    if model.tied_embeddings:
        raise ValueError("Meta's format has no tied embeddings; write the embedding twice")
    for name in ("num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "dim"):
        if getattr(model, name) % shards:
            raise ValueError(f"{name}={getattr(model, name)} does not divide by shards={shards}")


def _part_shape(shape: tuple[int, ...], split: int | None, shards: int) -> tuple[int, ...]:
    return tuple(n // shards if axis == split else n for axis, n in enumerate(shape))


def params_json(model: config.Model) -> dict:
    """The settings in Meta's words, with nothing left out that a reader would have to guess."""
    return {
        "dim": model.dim,
        "n_layers": model.num_layers,
        "n_heads": model.num_heads,
        "n_kv_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        **_ffn_rule(model),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
    }


def _ffn_rule(model: config.Model) -> dict:
    """A multiple and multiplier from which Meta's rule makes this feed-forward width."""
    for multiple_of, multiplier in ((256, 1.0), (4_096, 1.3)):  # the official ones
        if ffn_dim(model.dim, multiple_of, multiplier) == model.ffn_dim:
            return {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    multiple_of = model.ffn_dim & -model.ffn_dim  # the largest power of two in it
    multiplier = (model.ffn_dim + 0.5) / int(2 * (4 * model.dim) / 3)
    multiplier = multiplier if multiple_of == 1 else model.ffn_dim / int(2 * (4 * model.dim) / 3)
    assert ffn_dim(model.dim, multiple_of, multiplier) == model.ffn_dim
    return {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
