"""What a stage says about itself: a live line, metrics.jsonl, and TensorBoard events.

MFU (model FLOP utilisation) = tokens/s * flops per token / (devices * peak FLOP/s). The flops per
token are config.Model.flops_per_token: causal attention counted once, no recomputation.
"""

import json
import math
import os
import tempfile
import time
from typing import Any

import jax
from etils import epath

from codellama_jax import config, whole

PEAK_FLOPS = {  # bfloat16, per JAX device, from the makers' data sheets
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def mfu(model: config.Model, seq_len: int, tokens_per_second: float, devices: list) -> float | None:
    """Share of the devices' peak that the model's own arithmetic uses; None for unknown devices."""
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    if peak is None:
        return None
    return tokens_per_second * model.flops_per_token(seq_len) / (peak * len(devices))


class Record:
    """The record of one stage, read one step late so that the devices never wait for it.

    <folder>/metrics.jsonl holds a JSON object for every log_every-th step and for every step that
    is saved or evaluated. A resumed stage drops the lines after its step and counts its tokens on
    from there. Only the first process of a run writes; all of them stop on a non-finite loss.
    """

    def __init__(self, folder: epath.PathLike, stage: config.Stage, start_step: int, devices: list):
        self.stage, self.step, self.devices = stage, start_step, devices
        self.folder = epath.Path(folder)
        self.writes = jax.process_index() == 0
        self._pending: tuple[int, Any] | None = None
        self._tokens = dict.fromkeys(sorted(stage.data.mix), 0)
        self._clock = _Clock(start_step)
        if self.writes:
            self._open()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_) -> None:
        if self.writes:
            self._bar.stop()
            self._events.close()
            self._lines.close()

    def stepped(self, values: dict[str, jax.Array]) -> None:
        """Notes that a step was dispatched; reads the step before it.

        Raises FloatingPointError when that step's loss is not finite.
        """
        before, self.step = self._pending, self.step + 1
        self._pending = (self.step, values)
        if before:
            self._read(*before)

    def flush(self) -> None:
        """Reads and writes the newest step, too: waits for the devices."""
        if self._pending:
            self._read(*self._pending, write=True)
        self._pending = None

    def evaluated(self, values: dict[str, Any], seconds: float) -> None:
        """Notes held-out results of the current step and keeps their time out of tokens/s."""
        self._clock.skip(seconds)
        self._write(self.step, values)
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in values["heldout"].items())
        self.tell(f"{self.stage.name:<13} step {self.step:>6}  held-out loss: {losses}")

    def tell(self, text: str) -> None:
        """Prints a line above the live one."""
        if self.writes:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _read(self, step: int, values: dict[str, jax.Array], *, write: bool = False) -> None:
        numbers = jax.device_get(values)
        for name, targets in zip(self._tokens, numbers.pop("tokens_by_corpus"), strict=True):
            self._tokens[name] += int(targets)
        numbers = {name: float(value) for name, value in numbers.items()}
        if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["grad_norm"]):
            raise FloatingPointError(
                f"stage {self.stage.name!r}: loss {numbers['loss']} and gradient norm "
                f"{numbers['grad_norm']} at step {step}. The last checkpoint is sound: start again "
                "to go on from it, with a lower optim.peak_lr if it happens again"
            )
        if self.writes:
            self._show(step, numbers, write or step % self.stage.log_every == 0)

    def _show(self, step: int, numbers: dict[str, float], write: bool) -> None:
        rate = self._clock.rate(step) * self.stage.data.batch_tokens
        share = mfu(self.stage.model, self.stage.data.seq_len, rate, self.devices)
        text = (
            f"loss {numbers['loss']:.3f}  grad norm {numbers['grad_norm']:.2f}  "
            f"lr {numbers['learning_rate']:.1e}  {rate:,.0f} tokens/s"
        ) + (f"  MFU {share:.1%}" if share is not None else "")
        self._bar.update(self._task, completed=step, text=text)
        if not write:
            return
        self._write(
            step,
            {
                "loss": numbers["loss"],
                "grad_norm": numbers["grad_norm"],
                "learning_rate": numbers["learning_rate"],
                "tokens_per_second": rate,
                "mfu": share,
                "tokens": dict(self._tokens),
            },
        )
        if not self._bar.console.is_terminal:
            self.tell(f"{self.stage.name:<13} step {step:>6}/{self.stage.steps}  {text}")

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in _flat(values).items():
            self._events.add_scalar(name, value, step)

    def _open(self) -> None:
        from rich import progress
        from tensorboardX import SummaryWriter

        kept = drop_after(self.folder / "metrics.jsonl", self.step if self.step else -1)
        for line in kept:
            self._tokens |= line.get("tokens", {})
        remote = "://" in os.fspath(self.folder)
        self._lines = _Remote(self.folder, kept) if remote else _Local(self.folder)
        purged = self.step + 1 if self.step else 0
        self._events = SummaryWriter(self._lines.events, purge_step=purged)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description:<13}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            transient=True,
        )
        self._task = self._bar.add_task(
            self.stage.name, total=self.stage.steps, completed=self.step, text="compiling"
        )
        self._bar.start()


class _Local:
    """The files of a record on a disk: metrics.jsonl grows by a line at a time."""

    def __init__(self, folder: epath.Path):
        self.events = os.fspath(folder / "events")
        self._file = (folder / "metrics.jsonl").open("a")

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


UPLOAD_EVERY = 30.0  # seconds


class _Remote:
    """The files of a record in a bucket (gs://...), where a file can be replaced but not grow.

    Both are written whole from what is kept here, now and then and at the end.
    """

    def __init__(self, folder: epath.Path, kept: list[dict]):
        self._folder = folder
        self._text = [json.dumps(line) + "\n" for line in kept]
        self._own = tempfile.TemporaryDirectory(prefix="codellama-events-")
        self.events = self._own.name
        self._uploaded = time.monotonic()

    def write(self, line: str) -> None:
        self._text.append(line)
        if time.monotonic() - self._uploaded > UPLOAD_EVERY:
            self._upload()

    def close(self) -> None:
        self._upload()
        self._own.cleanup()

    def _upload(self) -> None:
        (self._folder / "metrics.jsonl").write_text("".join(self._text))
        (self._folder / "events").mkdir(parents=True, exist_ok=True)
        for file in epath.Path(self.events).iterdir():
            (self._folder / "events" / file.name).write_bytes(file.read_bytes())
        self._uploaded = time.monotonic()


class _Clock:
    """Steps per second, smoothed; time that was not training is skipped."""

    def __init__(self, step: int):
        self._then, self._step, self._seconds = None, step, None

    def skip(self, seconds: float) -> None:
        if self._then is not None:
            self._then += seconds

    def rate(self, step: int) -> float:
        now = time.monotonic()
        if self._then is not None and step > self._step:
            took = max(now - self._then, 1e-9) / (step - self._step)
            self._seconds = took if self._seconds is None else 0.9 * self._seconds + 0.1 * took
        self._then, self._step = now, step
        return 1 / self._seconds if self._seconds else 0.0  # 0 for the step that compiled


def drop_after(path: epath.Path, step: int) -> list[dict]:
    """Rewrites a metrics.jsonl without the lines after `step` and without a half-written one.

    Returns the lines that are left.
    """
    if not path.exists():
        return []
    kept = [line for line in read(path.parent) if line["step"] <= step]
    whole.write(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read(folder: epath.PathLike) -> list[dict]:
    """The lines of a stage's metrics.jsonl; the one that a killed run left half-written is not."""
    lines = []
    for text in (epath.Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _flat(values: dict, prefix: str = "") -> dict[str, float]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat
