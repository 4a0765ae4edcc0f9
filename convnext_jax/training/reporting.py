"""What a run tells: console, JSON lines, TensorBoard, and the curves at its end.

This is the only part that writes metrics. `WORKDIR/metrics.jsonl` is the record that the others can
be made from: one JSON object a line, appended and flushed at once, so that a killed run loses at
most its last line. Its kinds of line are:

    {"kind": "train", "step": 50, "epoch": 0.5, "loss": 2.1, "learning_rate": 0.001, ...}
    {"kind": "eval",  "step": 100, "epoch": 1.0, "accuracy": 0.71, "ema_accuracy": 0.64, ...}
    {"kind": "resume", "step": 75}

A run that starts again from step S writes a `resume` line, which takes back every earlier line of
a step beyond S; those stay in the file, and `read_metrics` leaves them out. Floats are written so
that they read back bit for bit; JSON knows no NaN and no infinity, so these are the strings "NaN",
"Infinity" and "-Infinity", which Python's and pandas' float parsers read.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from convnext_jax.errors import UserError
from convnext_jax.training import console, curves
from convnext_jax.training.chrono import Chrono

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
TENSORBOARD_DIR = "tensorboard"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Reporter:
    """Reports one run. On every process but the primary one it only keeps the chrono."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        is_primary: bool,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        device_count: int,
        start_step: int = 0,
        chrono_state: Mapping[str, float] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the logs in `workdir` (a local or mounted path) and starts the clock.

        Args:
          workdir: where the logs lie; created if absent, appended to if they are there.
          is_primary: whether this process prints and writes.
          total_steps: where the run ends.
          steps_per_epoch: turns steps into epochs.
          batch_size: examples a step, of all processes.
          device_count: devices of all processes.
          start_step: the step that was restored, 0 for a new run.
          chrono_state: `chrono.state()` as it lay in the checkpoint.
          stream: where a person reads; stdout by default.
          clock: for the chrono; given by tests.

        Raises:
          UserError: if `workdir` is a URL, or its metrics file is broken in the middle.
        """
        self.chrono = Chrono(start_step, chrono_state, clock=clock)
        self._workdir = Path(workdir)
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._device_count = device_count
        self._primary = is_primary
        if not is_primary:
            return
        if "://" in os.fspath(workdir):
            raise UserError(
                f"logs cannot be appended to in {os.fspath(workdir)}; give a local or mounted "
                "workdir"
            )
        self._console = console.Console(sys.stdout if stream is None else stream)
        self._workdir.mkdir(parents=True, exist_ok=True)
        # Its protobuf classes take a moment to load, and only the primary process needs them.
        from tensorboardX import SummaryWriter

        path = self._workdir / METRICS_FILE
        resuming = start_step > 0 or (path.exists() and path.stat().st_size > 0)
        self._log = _open_for_append(path)
        if resuming:
            self._write({"kind": "resume", "step": start_step})
        self._tensorboard = SummaryWriter(
            str(self._workdir / TENSORBOARD_DIR),
            # Tells TensorBoard, too, to drop what a killed run wrote beyond the checkpoint.
            purge_step=start_step + 1 if resuming else None,
            flush_secs=10,
        )

    def start_up(self, sections: Mapping[str, Any]) -> None:
        """Prints the start-up report.

        Args:
          sections: title -> (label -> value), or label -> value; integers get their thousands set
            apart, floats four figures, all else is printed by `str`.
        """
        if self._primary:
            self._console.print(console.block(sections) + "\n")

    def message(self, text: str) -> None:
        """Prints a line that stays."""
        if self._primary:
            self._console.print(text)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ends the chrono's lap at `step`, and prints and writes the training metrics.

        Call it on every process, right after the step's metrics have been fetched; first of all
        after the very first step, whose time is taken for the compilation's.

        Args:
          step: the number of steps taken.
          metrics: `loss` and `learning_rate` are shown on the progress line; all are written.
        """
        window = self.chrono.lap(step)
        if not self._primary:
            return
        each = window.seconds_per_step
        speed: dict[str, float] = {}
        if each:
            speed["images_per_second"] = self._batch_size / each
        if window.wait_fraction is not None:
            speed["wait_fraction"] = window.wait_fraction
        if window.compiling:
            speed["first_step_seconds"] = window.seconds
        speed["wall_seconds"] = self.chrono.wall_seconds
        self._record("train", step, {**metrics, **speed})
        if window.compiling:
            pace = [f"first step {console.duration(window.seconds)} with compilation"]
        else:
            rate = speed.get("images_per_second")
            pace = [
                console.rate(rate, self._device_count) if rate else "",
                f"waiting for data {speed.get('wait_fraction', 0.0):.0%}",
            ]
        left = self.chrono.time_left(step, self._total_steps)
        loss, learning_rate = metrics.get("loss"), metrics.get("learning_rate")
        self._console.live(
            console.line(
                self._position(step),
                f"loss {loss:.4f}" if loss is not None else "",
                f"lr {learning_rate:.2e}" if learning_rate is not None else "",
                *pace,
                f"eta {console.duration(left)}" if left is not None else "",
            )
        )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints and writes an evaluation's metrics; accuracies are fractions, 0 to 1."""
        if not self._primary:
            return
        self._record("eval", step, metrics)
        shown = (console.metric(name, value) for name, value in metrics.items())
        self._console.print(console.line(self._position(step), "evaluation", *shown))

    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        next_steps: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        """Prints the summary table, draws `curves.png` over all of the run, and closes the logs.

        Args:
          summary: further rows, label -> value, such as where the checkpoints lie.
          next_steps: label -> command, printed behind the summary.

        Returns:
          For each accuracy its last value by its own name and its best as `best_NAME`; `step`,
          `wall_seconds` and, if known, `images_per_second`. Empty on the other processes.
        """
        if not self._primary:
            return {}
        path, picture = self._workdir / METRICS_FILE, self._workdir / CURVES_FILE
        records = read_metrics(path)
        step = max((record["step"] for record in records), default=0)
        epochs = step / self._steps_per_epoch
        result: dict[str, float] = {"step": step, "wall_seconds": self.chrono.wall_seconds}
        rows: dict[str, Any] = {
            "steps": f"{step:,} of {self._total_steps:,} ({epochs:,.4g} epochs)"
        }
        for name, (last, best, best_step) in _accuracies(records).items():
            result |= {name: last, f"best_{name}": best}
            rows[name.replace("_", " ")] = f"last {last:.2%}, best {best:.2%} at step {best_step:,}"
        rows["wall time"] = (
            f"{console.duration(self.chrono.wall_seconds)}, of which training "
            f"{console.duration(self.chrono.train_seconds)} without compilation"
        )
        if self.chrono.train_steps and self.chrono.train_seconds > 0:
            mean = self.chrono.train_steps * self._batch_size / self.chrono.train_seconds
            result["images_per_second"] = mean
            rows["throughput"] = console.rate(mean, self._device_count)
            rows["data wait"] = f"{self.chrono.wait_fraction:.1%} of the training time"
        rows |= summary or {}
        rows["metrics"] = path
        rows["tensorboard"] = self._workdir / TENSORBOARD_DIR
        if records:
            curves.plot_curves(records, picture, steps_per_epoch=self._steps_per_epoch)
            rows["curves"] = picture
        self._console.print("\n" + console.block({"summary": rows}))
        if next_steps:
            self._console.print("\n" + console.block({"next": next_steps}))
        self.close()
        return result

    def close(self) -> None:
        """Flushes and closes the logs; for a run that ends otherwise than by `finish`."""
        if self._primary:
            self._tensorboard.close()
            self._log.close()

    def _position(self, step: int) -> str:
        steps = f"{self._total_steps:,}"
        epochs = f"{self._total_steps / self._steps_per_epoch:,.2f}"
        epoch = f"{step / self._steps_per_epoch:,.2f}"
        return console.line(
            f"step {step:>{len(steps)},}/{steps}", f"epoch {epoch:>{len(epochs)}}/{epochs}"
        )

    def _record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        record: dict[str, Any] = {"kind": kind, "step": int(step)}
        record["epoch"] = step / self._steps_per_epoch
        for name, value in metrics.items():
            if name in record:
                raise ValueError(f"a metric may not be called {name!r}")
            value = value if isinstance(value, int) else float(value)
            record[name] = value
            # TensorBoard has no use for a point that is not a number; the console shows it.
            if math.isfinite(value):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._log.write(_to_json(record) + "\n")
        self._log.flush()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a run's metrics as if it had never been interrupted.

    Lines that a later `resume` line takes back are left out, as are lines torn by a kill; of
    several lines of one kind and step the last one counts.

    Args:
      path: a `metrics.jsonl`.

    Returns:
      The records of kind "train" and "eval", in the order in which they were written.

    Raises:
      UserError: if the file is absent, or a line is broken otherwise than by a kill.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; is its directory a run's workdir?")
    records: dict[tuple[str, int], dict[str, Any]] = {}
    torn: int | None = None
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text:
            continue
        record = _from_json(text)
        if torn is not None and (record is None or record["kind"] != "resume"):
            raise UserError(f"line {torn} of {path} is not a metrics record; remove that line")
        torn = number if record is None else None
        if record is None:
            continue
        if record["kind"] == "resume":
            records = {key: r for key, r in records.items() if r["step"] <= record["step"]}
            continue
        key = record["kind"], record["step"]
        records.pop(key, None)
        records[key] = record
    return list(records.values())


def _accuracies(records: list[dict[str, Any]]) -> dict[str, tuple[float, float, int]]:
    """For each accuracy evaluated: its last value, its best one, and the step of the best."""
    evaluations = [record for record in records if record["kind"] == "eval"]
    found = {}
    for name in dict.fromkeys(name for r in evaluations for name in r if "accuracy" in name):
        values = [(r[name], r["step"]) for r in evaluations if name in r]
        best, step = max(values, key=lambda v: -math.inf if math.isnan(v[0]) else v[0])
        found[name] = values[-1][0], best, step
    return found


def _open_for_append(path: Path) -> TextIO:
    log = path.open("a", encoding="utf-8")
    if path.stat().st_size > 0:
        with path.open("rb") as existing:
            existing.seek(-1, os.SEEK_END)
            # A line that a kill cut short must not run into the next one.
            if existing.read() != b"\n":
                log.write("\n")
    return log


def _to_json(record: Mapping[str, Any]) -> str:
    def value(v: Any) -> Any:
        if isinstance(v, float) and not math.isfinite(v):
            return "NaN" if math.isnan(v) else "Infinity" if v > 0 else "-Infinity"
        return v

    return json.dumps({k: value(v) for k, v in record.items()}, allow_nan=False)


def _from_json(text: bytes) -> dict[str, Any] | None:
    """The record, or None if the line is not whole."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
        return None
    return {
        k: _NON_FINITE.get(v, v) if isinstance(v, str) and k != "kind" else v
        for k, v in record.items()
    }
