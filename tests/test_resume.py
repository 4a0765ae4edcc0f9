"""A run that is killed and started again is the run that was never interrupted, bit for bit."""

import json
import os
import signal
import subprocess
import tempfile
import time

import pytest
from runs import (
    assert_bitwise_equal,
    checkpoint,
    command,
    records,
    tiny,
)

from convnext_jax.train import train
from convnext_jax.training.reporting import read_metrics

pytest_plugins = ["run_fixtures"]
LAST = 40


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level("INFO", logger="convnext_jax")


class Started:
    """The program as a process of its own, watched from outside."""

    def __init__(self, workdir):
        self.workdir = workdir
        # To files, since a pipe that nobody reads would stop the program.
        self._files = [tempfile.TemporaryFile("w+") for _ in ("out", "err")]  # noqa: SIM115
        self.process = subprocess.Popen(
            command(workdir), stdout=self._files[0], stderr=self._files[1]
        )

    def wait_until(self, holds):
        end = time.monotonic() + 240
        while not holds():
            assert self.process.poll() is None, f"ended by itself: {self.printed()}"
            assert time.monotonic() < end, f"nothing happened: {self.printed()}"
            time.sleep(0.001)

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def printed(self):
        text = []
        for file in self._files:
            file.seek(0)
            text.append(file.read())
        return text

    def close(self):
        self.process.kill()
        self.process.wait()
        for file in self._files:
            file.close()


@pytest.fixture
def start(quick, tmp_path):
    started = []

    def start():
        started.append(Started(tmp_path / "run"))
        return started[-1]

    yield start
    for program in started:
        program.close()


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((r["step"] for r in read_metrics(path)), default=0) if lines else 0


def resumes(workdir):
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
    return [json.loads(line)["step"] for line in lines if b'"resume"' in line]


def whole(workdir):
    return [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]


def half_written(workdir):
    return [p.name for p in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def stopped_while_saving(program):
    """Halts the program, and says whether that was in the middle of a save; if not, lets it go."""
    if not half_written(program.workdir):
        return False
    program.signal(signal.SIGSTOP)
    # The process is halted a moment after the signal; what lies there then, stays.
    os.waitid(os.P_PID, program.process.pid, os.WSTOPPED | os.WNOWAIT)
    if half_written(program.workdir):
        return True
    program.signal(signal.SIGCONT)
    return False


@pytest.mark.slow
def test_killed_twice_and_started_again(finished, start):
    """Once between checkpoints, once while a checkpoint is being written."""
    program = start()
    workdir = program.workdir
    program.wait_until(lambda: whole(workdir) and last_step(workdir) > 12)
    program.kill()
    first = last_step(workdir)
    assert 12 < first < LAST, "the kill came too late; the test shows nothing"

    program = start()
    # By then what the first kill left has been cleaned up.
    program.wait_until(lambda: len(resumes(workdir)) == 1)
    program.wait_until(lambda: stopped_while_saving(program))
    program.kill()
    torn = half_written(workdir)
    assert torn
    second = last_step(workdir)

    program = start()
    assert program.process.wait(timeout=240) == 0, program.printed()
    _, err = program.printed()
    for name in torn:
        assert err.count(str(workdir / "checkpoints" / name)) == 1, err
    assert err.count("half-written") == len(torn)

    resumed = resumes(workdir)
    assert len(resumed) == 2
    assert min(resumed) > 0
    ours, theirs = records(workdir), records(finished.workdir)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    assert sum(r["kind"] == "train" for r in ours) == LAST
    assert ours == theirs
    arrays = checkpoint(workdir, LAST)
    assert_bitwise_equal(arrays, checkpoint(finished.workdir, LAST))
    groups = {name.split("/")[0] for name in arrays}
    assert groups == {"step", "params", "opt_state", "ema_params", "skipped"}
    trains = [r for r in ours if r["kind"] == "train"]
    evals = [r for r in ours if r["kind"] == "eval"]
    print(
        f"\nkilled after step {first}, and after step {second} while writing {torn[0]}; "
        f"resumed at steps {resumed}\n"
        f"equal to the uninterrupted run, bit for bit: "
        f"loss, gradient norm and learning rate of {len(trains)} steps "
        f"(last loss {trains[-1]['loss']!r}), {len(evals)} evaluations (last accuracy "
        f"{evals[-1]['accuracy']!r}, of the average {evals[-1]['ema_accuracy']!r}), {len(arrays)} "
        f"arrays of the checkpoint of step {LAST} ({', '.join(sorted(groups))})"
    )


def cut_short(path):
    for file in (path / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def leave_half_written(path):
    path.rename(path.with_name(f"{path.name}.orbax-checkpoint-tmp"))


@pytest.mark.parametrize(
    ("harm", "word"), [(cut_short, "damaged"), (leave_half_written, "half-written")]
)
def test_goes_on_from_the_checkpoint_before_a_spoilt_one(
    finished, copy_of_finished, caplog, capsys, harm, word
):
    workdir = copy_of_finished
    harm(workdir / "checkpoints" / str(LAST))
    result = train(tiny(), workdir)
    lines = [r.getMessage() for r in caplog.records if "passing over" in r.getMessage()]
    assert len(lines) == 1
    assert f"passing over the {word} checkpoint {workdir / 'checkpoints' / str(LAST)}" in lines[0]
    assert "\n" not in lines[0]
    assert "resumed at step 30" in capsys.readouterr().out
    assert result["step"] == LAST
    assert records(workdir) == records(finished.workdir)
    assert_bitwise_equal(checkpoint(workdir, LAST), checkpoint(finished.workdir, LAST))


def test_a_finished_run_started_again_changes_nothing(finished, copy_of_finished, capsys):
    result = train(tiny(), copy_of_finished)
    assert result["step"] == LAST
    out = capsys.readouterr().out
    assert f"resumed at step {LAST}" in out
    assert f"{LAST} of {LAST}" in out
    assert "first step" not in out
    assert records(copy_of_finished) == records(finished.workdir)
    assert_bitwise_equal(checkpoint(copy_of_finished, LAST), checkpoint(finished.workdir, LAST))
