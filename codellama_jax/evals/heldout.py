"""Losses on documents that are never trained on: per corpus, and by position in long ones."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from codellama_jax import config, state
from codellama_jax.data import corpus, mix, tokens
from codellama_jax.data.rows import Row
from codellama_jax.evals import bootstrap, infilling, scoring

INFILLING_TOKENS = 1_024  # longest infilling problem asked during training


class Loss(NamedTuple):
    nats: float  # per token
    bits_per_byte: float
    tokens: int


class Judge:
    """The measurements of a stage while it trains, always on the same rows and problems.

    judge(params) -> {"heldout": {corpus: nats per token}, "infilling": {form: bits per byte}}, the
    latter only for a stage that trains infilling. Ready for metrics.jsonl.
    """

    def __init__(self, stage: config.Stage, corpus_dir: str | Path, tokenizer, mesh: Mesh):
        self.stage, self.tokenizer, self.mesh = stage, tokenizer, mesh
        self.rows = read(stage.data, corpus_dir, tokenizer, stage.eval_rows)
        self.problems = _problems(stage, corpus_dir, tokenizer)

    def __call__(self, params: state.Params) -> dict[str, dict[str, float]]:
        stage = self.stage
        measured = _losses(stage, params, self.rows, self.tokenizer, self.mesh)
        values = {"heldout": {name: loss.nats for name, loss in measured.items()}}
        if self.problems:
            middles = infilling.bits_per_byte(
                stage.model,
                params,
                self.tokenizer,
                self.problems,
                layout=stage.layout,
                mesh=self.mesh,
            )
            values["infilling"] = {form: i.mean for form, i in middles.bits_per_byte.items()}
        return values


def losses(
    stage: config.Stage,
    params: state.Params,
    corpus_dir: str | Path,
    tokenizer,
    mesh: Mesh,
    rows: int,
) -> dict[str, Loss]:
    """The loss on up to `rows` held-out rows of each corpus of the stage's mix, without infilling.

    The rows depend on the corpus, seq_len and seed alone, so numbers compare between steps and
    stages. A byte is one of the tokens' text, the space before a document included.
    """
    return _losses(stage, params, read(stage.data, corpus_dir, tokenizer, rows), tokenizer, mesh)


def read(data: config.Data, corpus_dir: str | Path, tokenizer, num_rows: int) -> dict[str, Row]:
    """The held-out rows of every corpus of the mix that has any: {corpus: rows [R, T+1]}."""
    folder = corpus.open(corpus_dir, tokenizer)
    return {
        name: mix.heldout_rows(data, corpus_dir, tokenizer, name, num_rows)
        for name in mix.names(data)
        if len(folder.split(name, "heldout"))
    }


def _losses(stage, params, rows_of: dict[str, Row], tokenizer, mesh) -> dict[str, Loss]:
    measured = {}
    for name, rows in rows_of.items():
        nll, mask = scoring.losses(
            stage.model,
            params,
            rows,
            layout=stage.layout,
            mesh=mesh,
            isolated=not stage.data.attend_across_documents,
        )
        count = max(int(mask.sum()), 1)
        num_bytes = max(int(tokenizer.num_bytes[rows["tokens"][:, 1:]][mask].sum()), 1)
        total = float(nll.sum(dtype=np.float64))
        measured[name] = Loss(total / count, total / np.log(2) / num_bytes, count)
    return measured


def _problems(stage: config.Stage, corpus_dir, tokenizer) -> list[infilling.Problem]:
    """Problems of the corpus `code`, or of the largest of the mix; none if nothing is infilled."""
    if stage.data.infilling_rate == 0:
        return []
    names = corpus.open(corpus_dir, tokenizer).names
    name = "code" if "code" in names else max(stage.data.mix, key=stage.data.mix.get)
    return infilling.problems(
        corpus_dir,
        tokenizer,
        count=stage.eval_rows,
        max_tokens=min(stage.data.seq_len, INFILLING_TOKENS),
        seed=stage.data.seed,
        corpus_name=name,
    )


# -- by position ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByPosition:
    """Mean loss at positions [edges[i], edges[i+1]) of held-out documents (Fig. 4a).

    Every mean is over the same text, so a difference between positions is one of context alone.
    """

    edges: list[int]
    mean: list[float]  # nats per token
    error: list[float]  # bootstrap standard error over documents, each text's level taken out
    documents: int
    windows: int  # rows cut from these documents
    old_length: int | None  # the longest row before the long-context stage
    past: bootstrap.Interval | None  # loss past old_length less that in the half before it


def by_position(
    model: config.Model,
    params: state.Params,
    corpus_dir: str | Path,
    tokenizer,
    mesh: Mesh,
    *,
    length: int,
    layout: config.Layout,
    corpus_name: str = "code_files",
    old_length: int | None = None,
    buckets: int = 8,
    max_windows: int = 192,
) -> ByPosition:
    """The loss by position in rows of `length` tokens, all of one document each (section 3.3).

    A long held-out document gives up to 2 * buckets rows, each one bucket further on, max_windows
    in all. A piece of text as wide as a bucket then stands in one row at the first position, in the
    row before at the second, and so on; only pieces that stand in every position count. `model` may
    have been trained on shorter rows: it is read with max_seq_len=length, its rope_theta as it is.

    Raises ValueError where no held-out document is long enough, and for a length that does not
    divide into `buckets`.
    """
    config.check(
        length % buckets == 0,
        f"length={length} does not divide into buckets={buckets} of equal width",
    )
    width = length // buckets
    rows, documents = _windows(corpus_dir, tokenizer, corpus_name, length, width, max_windows)
    wide = replace(model, max_seq_len=length)
    nll, _ = scoring.losses(wide, params, rows, layout=layout, mesh=mesh)
    nll = nll.astype(np.float64)
    by_row = nll.reshape(len(nll), buckets, width).mean(axis=2)  # [windows, buckets]
    by_piece, owners = same_text(by_row, documents)  # [pieces, buckets]
    shape = by_piece - by_piece.mean(axis=1, keepdims=True)
    past = None
    if old_length is not None:
        old = old_length // width
        config.check(
            old >= 2 and old_length % (2 * width) == 0,
            f"half of old_length={old_length} is not a whole number of buckets of {width} tokens",
        )
        change = by_piece[:, old:].mean(1) - by_piece[:, old // 2 : old].mean(1)
        past = bootstrap.interval(change, groups=owners)
    return ByPosition(
        edges=list(range(0, length + 1, width)),
        mean=by_piece.mean(axis=0).tolist(),
        error=[bootstrap.interval(column, groups=owners).error for column in shape.T],
        documents=len(set(documents)),
        windows=len(nll),
        old_length=old_length,
        past=past,
    )


def same_text(by_row: np.ndarray, documents: list[int]) -> tuple[np.ndarray, list[int]]:
    """by_row[row, bucket] of rows one bucket apart -> [piece of text, bucket], owners of pieces.

    Piece j of a document stands in its row j - k at bucket k; kept if all those rows are there.
    """
    buckets, pieces, owners = by_row.shape[1], [], []
    for document in dict.fromkeys(documents):
        rows = by_row[[d == document for d in documents]]
        for piece in range(buckets - 1, len(rows)):
            pieces.append([rows[piece - bucket, bucket] for bucket in range(buckets)])
            owners.append(document)
    return np.array(pieces), owners


def _windows(
    corpus_dir, tokenizer, name: str, length: int, stride: int, count: int
) -> tuple[Row, list[int]]:
    """Rows of BOS and `length` consecutive tokens, `stride` apart; the document each is from."""
    split = corpus.open(corpus_dir, tokenizer).split(name, "heldout")
    buckets = length // stride
    fitting = (np.asarray(split.lengths, np.int64) - 1 - length) // stride + 1  # of each document
    chosen = np.flatnonzero(fitting >= buckets)
    config.check(
        len(chosen) > 0,
        f"no held-out document of corpus {name!r} has the {2 * length - stride + 1} tokens that "
        f"are needed; the longest has {max(split.lengths, default=0)}",
    )
    places = [(n, i) for i in chosen for n in range(min(fitting[i], 2 * buckets))][:count]
    texts = []
    for number, document in places:
        record, start = split.record(int(document)), 1 + number * stride
        counts = record.get("chunk_tokens", [int(split.lengths[document]) - 2])  # no BOS, no EOS
        texts.append(tokens.encode_slice(tokenizer, record["text"], counts, start, start + length))
    ids = np.insert(np.array(texts, np.int32), 0, tokenizer.bos_id, axis=1)
    positions = np.broadcast_to(np.arange(length + 1, dtype=np.int32), ids.shape)
    rows = {
        "tokens": ids,
        "loss_mask": positions > 0,
        "segments": np.ones_like(ids),
        "positions": positions,
    }
    return rows, [int(document) for _, document in places]
