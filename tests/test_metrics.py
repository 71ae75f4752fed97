import json
import struct
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import spine_fixture as tiny
from etils import epath

from codellama_jax import metrics
from codellama_jax.config import SIZES

STAGE = tiny.stage(log_every=2, data=tiny.two_corpora(), steps=10, eval_every=100, save_every=100)


def chips(kind: str, count: int) -> list:
    return [SimpleNamespace(device_kind=kind)] * count


# -- model flop utilisation ----------------------------------------------------------------------
def test_flops_per_token_are_those_counted_by_hand():
    D, L, F, V, T = 4_096, 32, 11_008, 32_016, 4_096
    matrices = L * (4 * D * D + 3 * D * F) + D * V  # the embedding is looked up, not multiplied
    norms = (2 * L + 1) * D
    causal_attention = 6 * L * D * T  # 2 products, 2 flops, half the square, 3 passes
    assert SIZES["7b"].flops_per_token(T) == 6 * (matrices + norms) + causal_attention
    assert SIZES["7b"].flops_per_token(T) == pytest.approx(42.9e9, rel=1e-3)
    assert SIZES["34b"].flops_per_token(16_384) == pytest.approx(239.5e9, rel=2e-3)


def test_mfu_is_the_share_of_the_peak_of_all_devices():
    flops = SIZES["7b"].flops_per_token(4_096)
    assert metrics.mfu(
        SIZES["7b"], 4_096, 197e12 / flops, chips("TPU v5 lite", 1)
    ) == pytest.approx(1)
    half = 0.5 * 256 * 197e12 / flops
    assert metrics.mfu(SIZES["7b"], 4_096, half, chips("TPU v5 lite", 256)) == pytest.approx(0.5)


def test_a_device_without_a_known_peak_has_no_mfu():
    assert metrics.mfu(SIZES["7b"], 4_096, 1e6, chips("cpu", 8)) is None


# -- metrics.jsonl -------------------------------------------------------------------------------
def values(loss=1.0, grad_norm=0.5, tokens=(10, 3)) -> dict[str, jax.Array]:
    return {
        "loss": jnp.float32(loss),
        "tokens": jnp.int32(sum(tokens)),
        "tokens_by_corpus": jnp.array(tokens, jnp.int32),
        "grad_norm": jnp.float32(grad_norm),
        "learning_rate": jnp.float32(1e-3),
    }


def record(folder, start=0, stage=STAGE):
    return metrics.Record(folder, stage, start, chips("cpu", 1))


def steps(folder) -> list[int]:
    return [line["step"] for line in metrics.read(folder)]


def test_a_step_is_read_when_the_next_was_dispatched(tmp_path):
    with record(tmp_path) as lines:
        lines.stepped(values())
        lines.stepped(values(loss=2.5))
        assert steps(tmp_path) == []  # step 2 may still be running
        lines.stepped(values())
        assert steps(tmp_path) == [2]
        lines.flush()
        assert steps(tmp_path) == [2, 3]
        lines.flush()
    assert steps(tmp_path) == [2, 3]
    line = metrics.read(tmp_path)[0]
    assert line["loss"] == 2.5
    assert line["tokens"] == {"code": 20, "python": 6}
    assert set(line) == {
        "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "tokens"
    }  # fmt: skip


def test_a_resumed_stage_drops_what_came_after_and_counts_on(tmp_path):
    with record(tmp_path) as lines:
        for _ in range(4):
            lines.stepped(values())
        lines.flush()
        for _ in range(4):
            lines.stepped(values(loss=7.0))
        lines.flush()
    assert steps(tmp_path) == [2, 4, 6, 8]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while it wrote
    assert steps(tmp_path) == [2, 4, 6, 8]
    with record(tmp_path, start=4) as lines:
        lines.stepped(values())
        lines.flush()
    assert steps(tmp_path) == [2, 4, 5]
    assert metrics.read(tmp_path)[-1]["tokens"] == {"code": 50, "python": 15}
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [2, 4, 5]


def test_a_stage_that_starts_anew_leaves_no_lines_of_the_first_try(tmp_path):
    for _ in range(2):
        with record(tmp_path) as lines:
            lines.evaluated({"heldout": {"code": 3.0}}, seconds=1.0)
            lines.stepped(values())
            lines.flush()
    assert steps(tmp_path) == [0, 1]
    assert metrics.read(tmp_path)[1]["tokens"] == {"code": 10, "python": 3}


def test_evaluation_writes_a_line_and_costs_no_speed(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with record(tmp_path, stage=tiny.stage(data=STAGE.data, steps=10, log_every=1)) as lines:
        for step in range(1, 7):
            lines.stepped(values())
            now[0] += 0.5  # a step takes half a second
            if step == 3:
                lines.flush()
                now[0] += 60
                lines.evaluated({"heldout": {"code": 3.0, "python": 2.0}}, seconds=60)
        lines.flush()
    rates = {x["step"]: x["tokens_per_second"] for x in metrics.read(tmp_path) if "loss" in x}
    assert rates.pop(1) == 0  # the step that compiled
    assert all(rate == pytest.approx(256 / 0.5, rel=0.3) for rate in rates.values())
    evaluations = [line for line in metrics.read(tmp_path) if "heldout" in line]
    assert evaluations == [{"step": 3, "heldout": {"code": 3.0, "python": 2.0}}]


@pytest.mark.parametrize(
    "bad", [{"loss": float("nan")}, {"loss": float("inf")}, {"grad_norm": float("nan")}]
)
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_step(tmp_path, bad):
    with record(tmp_path, start=4) as lines:
        lines.stepped(values())
        lines.stepped(values(**bad))
        with pytest.raises(FloatingPointError, match="'code': .* at step 6.*(nan|inf|peak_lr)"):
            lines.stepped(values())


def test_only_the_first_process_writes_and_all_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with record(tmp_path) as lines:
        lines.tell("hello")
        lines.evaluated({"heldout": {"code": 3.0}}, seconds=1.0)
        lines.stepped(values(loss=float("nan")))
        with pytest.raises(FloatingPointError):
            lines.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_log_file_gets_a_line_per_logged_step(tmp_path, capsys):
    with record(tmp_path) as lines:
        lines.tell("code [brackets] stay")
        for _ in range(5):
            lines.stepped(values(loss=2.345))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "code [brackets] stay"
    assert [line.split("step")[1].split()[0] for line in printed[1:] if "loss" in line] == [
        "2/10",
        "4/10",
    ]
    assert "loss 2.345  grad norm 0.50  lr 1.0e-03" in printed[1]


# -- in a bucket ---------------------------------------------------------------------------------
@pytest.fixture
def bucket(monkeypatch):
    """gs:// in memory, where files can be written but not appended to, as in object stores."""
    pytest.importorskip("fsspec")
    from etils.epath import backend, gpath
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ("gs",)
        store, pseudo_dirs = {}, [""]

        def _open(self, path, mode="rb", **how):
            if "a" in mode:
                raise NotImplementedError("objects cannot be appended to")
            return super()._open(path, mode, **how)

    files = Bucket(skip_instance_cache=True)
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda *_: files)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return epath.Path("gs://bucket/run/code")


def test_a_record_in_a_bucket_is_the_one_on_a_disk(bucket, tmp_path):
    for folder in (tmp_path / "code", bucket):
        folder.mkdir(parents=True)
        with record(folder) as lines:
            for _ in range(4):
                lines.stepped(values())
            lines.flush()
        time.sleep(1.1)  # TensorBoard's files are named by the second
        with record(folder, start=2) as lines:
            lines.stepped(values(loss=7.0))
            lines.evaluated({"heldout": {"code": 3.0}}, seconds=1.0)
            lines.flush()
    keep = [{**line, "tokens_per_second": None} for line in metrics.read(bucket)]
    want = [{**line, "tokens_per_second": None} for line in metrics.read(tmp_path / "code")]
    assert keep == want and [line["step"] for line in keep] == [2, 3, 3]
    events = tmp_path / "events"
    events.mkdir()
    for file in (bucket / "events").iterdir():
        (events / file.name).write_bytes(file.read_bytes())
    assert {(2, "loss", 1.0), (3, "loss", 7.0), (3, "heldout/code", 3.0)} <= set(scalars(events))


def test_a_record_in_a_bucket_is_written_now_and_then(bucket, monkeypatch):
    bucket.mkdir(parents=True)
    with record(bucket) as lines:
        lines.evaluated({"heldout": {"code": 3.0}}, seconds=1.0)
        assert not (bucket / "metrics.jsonl").exists()
        monkeypatch.setattr(metrics, "UPLOAD_EVERY", 0.0)
        lines.evaluated({"heldout": {"code": 2.0}}, seconds=1.0)
        assert len(metrics.read(bucket)) == 2


# -- TensorBoard ---------------------------------------------------------------------------------
def scalars(folder) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar in a folder of event files."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            place += length + 16
    return found


def test_tensorboard_reads_the_same_numbers(tmp_path):
    with record(tmp_path) as lines:
        lines.evaluated({"heldout": {"code": 3.0}}, seconds=1.0)
        lines.stepped(values(loss=2.5))
        lines.flush()
    found = scalars(tmp_path / "events")
    assert (0, "heldout/code", 3.0) in found
    assert (1, "loss", 2.5) in found
    assert (1, "tokens/python", 3.0) in found
    assert not any(tag == "mfu" for _, tag, _ in found)  # unknown on a CPU
