"""The reports: exact in the JSON lines, whole across kills, and legible on the terminal."""

import io
import json
import math
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from convnext_jax.errors import UserError
from convnext_jax.training import console
from convnext_jax.training.curves import plot_curves
from convnext_jax.training.reporting import Reporter, read_metrics


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_reporter(workdir, *, stream=None, clock=None, primary=True, **kwargs):
    return Reporter(
        workdir,
        is_primary=primary,
        total_steps=1200,
        steps_per_epoch=12.0,
        batch_size=64,
        device_count=8,
        stream=stream or io.StringIO(),
        clock=clock or Clock(),
        **kwargs,
    )


def events(workdir):
    """Every TensorBoard event, read as TFRecords with both checksums verified."""

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            header = data[at : at + 8]
            (length,) = struct.unpack("<Q", header)
            (header_crc,) = struct.unpack("<I", data[at + 8 : at + 12])
            body = data[at + 12 : at + 12 + length]
            (body_crc,) = struct.unpack("<I", data[at + 12 + length : at + 16 + length])
            assert (header_crc, body_crc) == (masked(header), masked(body))
            found.append(Event.FromString(body))
            at += 16 + length
    return found


def test_progress_lines_tell_rate_waiting_and_time_left(tmp_path):
    stream, clock = io.StringIO(), Clock()
    reporter = make_reporter(tmp_path, stream=stream, clock=clock)
    clock.now += 20.0
    reporter.train(1, {"loss": 6.9, "learning_rate": 1e-5})
    with reporter.chrono.waiting_for_data():
        clock.now += 1.5
    clock.now += 3.5
    with reporter.chrono.pause():
        clock.now += 100.0
    reporter.train(11, {"loss": 5.4321, "learning_rate": 4e-3, "grad_norm": 1.5})
    reporter.evaluation(12, {"accuracy": 0.98333, "ema_accuracy": 0.5, "loss": 0.1234})
    reporter.close()
    assert stream.getvalue().splitlines() == [
        "step     1/1,200  epoch   0.08/100.00  loss 6.9000  lr 1.00e-05  "
        "first step 20s with compilation",
        # 10 steps of 64 images in 5 s on 8 devices; 1,189 steps of half a second are left.
        "step    11/1,200  epoch   0.92/100.00  loss 5.4321  lr 4.00e-03  "
        "128 img/s (16.0/device)  waiting for data 30%  eta 9m54s",
        "step    12/1,200  epoch   1.00/100.00  evaluation  accuracy 98.33%  ema accuracy 50.00%  "
        "loss 0.1234",
    ]
    first, second, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert first["first_step_seconds"] == 20.0
    assert "images_per_second" not in first
    assert second == {
        "kind": "train",
        "step": 11,
        "epoch": 11 / 12,
        "loss": 5.4321,
        "learning_rate": 4e-3,
        "grad_norm": 1.5,
        "images_per_second": 128.0,
        "wait_fraction": 0.3,
        "wall_seconds": 125.0,
    }
    assert (evaluation["kind"], evaluation["ema_accuracy"]) == ("eval", 0.5)


def test_the_time_left_survives_a_restart(tmp_path):
    clock = Clock()
    reporter = make_reporter(tmp_path, clock=clock)
    reporter.train(1, {"loss": 1.0})
    clock.now += 200.0
    reporter.train(101, {"loss": 1.0})
    state = json.loads(json.dumps(reporter.chrono.state()))
    reporter.close()
    stream = io.StringIO()
    reporter = make_reporter(tmp_path, stream=stream, start_step=101, chrono_state=state)
    reporter.train(102, {"loss": 1.0})
    reporter.close()
    # 1,098 steps of two seconds, known before this start has measured a single one.
    assert stream.getvalue().rstrip().endswith("eta 36m36s")


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(0.1))]
    values += [math.nan, math.inf, -math.inf]
    reporter = make_reporter(tmp_path)
    for step, value in enumerate(values):
        reporter.train(step, {"loss": np.float32(value) if step == 5 else value})
    reporter.close()

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=no_constant)
    read = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [struct.pack("<d", value) for value in read] == [
        struct.pack("<d", value) for value in values
    ]


def test_a_resumed_run_reads_as_if_it_had_never_stopped(tmp_path):
    def run(start, steps, offset):
        reporter = make_reporter(tmp_path, start_step=start)
        for step in steps:
            reporter.train(step, {"loss": step + offset})
            if step % 20 == 0:
                reporter.evaluation(step, {"accuracy": (step + offset) / 1000})
        reporter.close()

    run(0, [10, 20], 0.5)  # killed before the first checkpoint
    run(0, [10, 20, 30, 40, 50], 0.25)  # killed after a checkpoint at 30
    run(30, [40, 50, 60], 0.0)
    run(60, [60, 70], 0.125)  # a line of the restored step itself is superseded when repeated
    path = tmp_path / "metrics.jsonl"
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "train"] == [
        (10, 10.25),
        (20, 20.25),
        (30, 30.25),
        (40, 40.0),
        (50, 50.0),
        (60, 60.125),
        (70, 70.125),
    ]
    assert [(r["step"], r["accuracy"]) for r in records if r["kind"] == "eval"] == [
        (20, 0.02025),
        (40, 0.04),
        (60, 0.060125),
    ]
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "resume"] == [0, 30, 60]
    assert sum(r["kind"] == "train" for r in lines) == 12, "nothing is ever removed"


def test_a_line_torn_by_a_kill_is_left_out_and_the_next_run_goes_on(tmp_path):
    reporter = make_reporter(tmp_path)
    reporter.train(1, {"loss": 1.0})
    reporter.train(2, {"loss": 2.0})
    reporter.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert [r["step"] for r in read_metrics(path)] == [1]
    reporter = make_reporter(tmp_path, start_step=1)
    reporter.train(2, {"loss": 2.5})
    reporter.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.5)]


def test_a_file_broken_otherwise_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(path)
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_killed_process_loses_nothing_that_it_reported(tmp_path):
    script = """
        import os, signal, sys
        from convnext_jax.training.reporting import Reporter
        reporter = Reporter(sys.argv[1], is_primary=True, total_steps=9, steps_per_epoch=1.0,
                            batch_size=1, device_count=1)
        reporter.train(1, {"loss": 0.1})
        reporter.evaluation(1, {"accuracy": 0.2})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=False)
    assert [r["kind"] for r in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "eval"]


def test_tensorboard_reads_the_events(tmp_path):
    reporter = make_reporter(tmp_path)
    reporter.train(1, {"loss": 2.5, "grad_norm": math.nan})
    reporter.train(2, {"loss": 2.25})
    reporter.evaluation(2, {"ema_accuracy": 0.75})
    reporter.close()
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert scalars[("train/loss", 1)] == 2.5
    assert scalars[("train/loss", 2)] == 2.25
    assert scalars[("eval/ema_accuracy", 2)] == 0.75
    assert ("train/grad_norm", 1) not in scalars

    # TensorBoard drops what lies beyond the restored step.
    make_reporter(tmp_path, start_step=1).close()
    starts = [e.step for e in events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [2]


def test_only_the_primary_process_writes(tmp_path, capsys):
    clock = Clock()
    reporter = make_reporter(tmp_path / "w", primary=False, clock=clock)
    reporter.start_up({"model": "x"})
    reporter.message("x")
    reporter.train(1, {"loss": 1.0})
    clock.now += 4.0
    reporter.train(3, {"loss": 1.0})
    reporter.evaluation(3, {"accuracy": 1.0})
    assert reporter.finish({"x": 1}) == {}
    reporter.close()
    assert not (tmp_path / "w").exists()
    assert capsys.readouterr().out == ""
    assert reporter.chrono.seconds_per_step == 2.0


def test_a_terminal_rewrites_the_line_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    reporter = make_reporter(tmp_path, stream=stream)
    reporter.train(1, {"loss": 1.0, "learning_rate": 1.0})
    reporter.train(2, {"loss": 1.0, "learning_rate": 1.0})
    reporter.message("a message")
    reporter.message("another")
    reporter.close()
    live, message, another, end = stream.getvalue().split("\n")
    first, second = live.split("\r\x1b[2K")[1:]
    assert first.startswith("step     1/1,200")
    assert second.startswith("step     2/1,200")
    assert max(len(first), len(second)) < 60
    assert (message, another, end) == ("a message", "another", "")


def test_start_up_report_is_aligned(tmp_path):
    stream = io.StringIO()
    reporter = make_reporter(tmp_path, stream=stream)
    reporter.start_up(
        {"model": {"name": "convnext_tiny", "parameters": 28_589_128, "GMACs": 4.4555}, "steps": 7}
    )
    reporter.close()
    assert stream.getvalue() == (
        "model\n"
        "  name        convnext_tiny\n"
        "  parameters  28,589,128\n"
        "  GMACs       4.455\n"
        "steps         7\n"
        "\n"
    )


def test_finish_summarises_and_draws_all_of_a_resumed_run(tmp_path):
    stream, clock = io.StringIO(), Clock()
    reporter = make_reporter(tmp_path, clock=clock)
    for step in (1, 12, 24):
        reporter.train(step, {"loss": 3.0})
        clock.now += 22.0
    reporter.evaluation(12, {"accuracy": 0.9, "ema_accuracy": 0.1, "loss": 1.0})
    reporter.evaluation(24, {"accuracy": 0.99, "ema_accuracy": 0.2, "loss": 1.0})
    state = reporter.chrono.state()
    reporter.close()
    reporter = make_reporter(tmp_path, stream=stream, start_step=12, chrono_state=state)
    reporter.evaluation(24, {"accuracy": 0.8, "ema_accuracy": 0.95, "loss": 0.5})
    result = reporter.finish({"checkpoints": "here"})
    assert result == {
        "step": 24,
        "wall_seconds": 66.0,
        "accuracy": 0.8,
        "best_accuracy": 0.9,
        "ema_accuracy": 0.95,
        "best_ema_accuracy": 0.95,
        "images_per_second": 23 * 64 / 44,
    }
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    assert lines[2:9] == [
        "summary",
        "steps         24 of 1,200 (2 epochs)",
        "accuracy      last 80.00%, best 90.00% at step 12",
        "ema accuracy  last 95.00%, best 95.00% at step 24",
        "wall time     1m06s, of which training 44s without compilation",
        "throughput    33.5 img/s (4.2/device)",
        "data wait     0.0% of the training time",
    ]
    assert lines[9] == "checkpoints   here"
    assert lines[-1] == f"curves        {tmp_path / 'curves.png'}"
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def png_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA"))


def test_every_curve_is_in_the_picture(tmp_path):
    records = [{"kind": "train", "step": s, "loss": 3 / s + (s % 2) / 10} for s in range(1, 100)]
    for step in range(10, 100, 10):
        scores = {"loss": 2 / step, "ema_loss": 4 / step, "accuracy": step / 100}
        records.append({"kind": "eval", "step": step, **scores, "ema_accuracy": step / 200})
    records.append({"kind": "train", "step": 100, "loss": math.nan})
    path = tmp_path / "curves.png"
    plot_curves(records, path, steps_per_epoch=10.0)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    pixels = png_pixels(path)
    assert pixels.shape == (600, 1500, 4)
    train, raw, ema = (0x56, 0xB4, 0xE9), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)

    def count(half, color):
        return int((half[..., :3] == color).all(-1).sum())

    left, right = pixels[:, :750], pixels[:, 750:]
    assert min(count(left, color) for color in (train, raw, ema)) > 500
    assert min(count(right, color) for color in (raw, ema)) > 500
    assert count(right, train) == 0

    plot_curves([], tmp_path / "empty.png", steps_per_epoch=1.0)
    assert count(png_pixels(tmp_path / "empty.png"), raw) == 0


def test_names_that_a_metric_may_not_have(tmp_path):
    reporter = make_reporter(tmp_path)
    with pytest.raises(ValueError, match="'step'"):
        reporter.train(1, {"step": 1.0})
    reporter.close()
    with pytest.raises(UserError, match="gs://bucket/run"):
        make_reporter("gs://bucket/run")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"), (math.inf, "?"), (0.25, "0.2s"), (9.97, "10s"), (59.6, "1m00s"),
        (187, "3m07s"), (3599.7, "1h00m"), (7500, "2h05m"), (4 * 86400 - 1, "3d23h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert console.duration(seconds) == text
