"""Several processes train as one does, and go on as fewer."""

import json
import signal
import sys
import textwrap

import numpy as np
import pytest
from pod import Pod
from runs import checkpoint, column, records

from convnext_jax.training.reporting import read_metrics

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.slow

# What is drawn image by image is compiled for longer than all the rest, and other tests hold it.
PLAIN = ("--config.augment.policy=", "--config.augment.erasing_prob=0")

# Python imports it before the program, which so tells what it reads.
RECORDER = """
    import json, os
    import convnext_jax.data.loader as loader

    real = loader.train_loader

    class Recorded(loader.BatchIterator):
        def __next__(self):
            batch = super().__next__()
            with open(self.path, "a") as file:
                line = {"step": self.step, "index": batch["index"].tolist()}
                file.write(json.dumps(line) + chr(10))
            self.step += 1
            return batch

    def train_loader(*arguments, start_step, process_index, **fields):
        batches = real(
            *arguments, start_step=start_step, process_index=process_index, **fields
        )
        batches.__class__ = Recorded
        batches.step = start_step
        batches.path = f"{os.environ['EXAMPLES']}.{process_index}"
        return batches

    loader.train_loader = train_loader
"""

# A notice is heard within a second or so, in which a run this small would have gone far.
SLOW = """
    import time
    import convnext_jax.data.loader as loader

    real = loader.BatchIterator.__next__

    def slowly(self):
        batch = real(self)
        time.sleep(0.05 if "mask" in batch else 0.4)
        return batch

    loader.BatchIterator.__next__ = slowly
"""


def customized(path, source):
    """The environment in which Python runs `source` before the program."""
    path.mkdir()
    (path / "sitecustomize.py").write_text(textwrap.dedent(source))
    return {"PYTHONPATH": str(path)}


@pytest.fixture
def recording(tmp_path):
    """The environment in which runs write down which examples they read."""
    environment = customized(tmp_path / "recorder", RECORDER)
    return lambda name: environment | {"EXAMPLES": str(tmp_path / name)}


def examples(environment, process):
    """What a process read in each step: the indices by the step's number."""
    with open(f"{environment['EXAMPLES']}.{process}") as file:
        return {line["step"]: line["index"] for line in map(json.loads, file)}


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists() or not path.read_bytes():
        return 0
    return max((record["step"] for record in read_metrics(path)), default=0)


def assert_trains_as(workdir, alone, steps, rtol=1e-4):
    for name in ("loss", "grad_norm"):
        wanted = column(alone, name)
        assert len(wanted) == steps
        np.testing.assert_allclose(column(workdir, name), wanted, rtol=rtol)
    for name in ("loss", "ema_loss"):
        wanted = column(alone, name, "eval")
        np.testing.assert_allclose(column(workdir, name, "eval"), wanted, rtol=rtol)
    counted = column(workdir, "examples", "eval")
    assert counted == [359] * len(column(alone, "loss", "eval"))


def test_many_processes_train_as_one(quick, tmp_path, recording):
    """Two processes of four devices, and four of two, against one of eight."""
    twenty = "--config.total=20 steps"
    alone, recorded = tmp_path / "alone", recording("alone")
    with Pod(alone, twenty, processes=1, devices=8, environment=recorded) as pod:
        assert pod.wait() == [0], pod.printed()
    whole = examples(recorded, 0)
    assert len(whole) == 20
    for processes in (2, 4):
        together, recorded = tmp_path / f"together{processes}", recording(f"of{processes}")
        with Pod(
            together,
            *(twenty, "--config.data.workers=1" if processes == 2 else "--config.data.workers=0"),
            processes=processes,
            devices=8 // processes,
            environment=recorded,
        ) as pod:
            assert pod.wait() == [0] * processes, pod.printed()
            out = pod.out(0)
            assert f"8 × cpu, {processes} processes" in out
            assert "32, 4 a device" in out
            assert "summary" in out
            # Nobody else says a word, and nobody else writes.
            assert [pod.out(i) for i in range(1, processes)] == [""] * (processes - 1)
            assert [pod.err(i) for i in range(processes)] == [""] * processes
        assert len(list((together / "tensorboard").iterdir())) == 1
        assert len((together / "metrics.jsonl").read_text().splitlines()) == 20 + 2
        assert_trains_as(together, alone, 20)
        assert checkpoint(together, 20).keys() == checkpoint(alone, 20).keys()
        # Each process reads its share alone, and together they read the same batches.
        shares = [examples(recorded, i) for i in range(processes)]
        for step, batch in whole.items():
            parts = [share[step] for share in shares]
            assert [len(part) for part in parts] == [32 // processes] * processes
            assert [index for part in parts for index in part] == batch
        print(
            f"\n{processes} processes of {8 // processes} devices: 20 losses within "
            f"{deviation(together, alone):.1e} of one process of 8 devices"
        )

    # Started again it goes on as four, too; here from the checkpoint of the single process.
    with Pod(alone, twenty, "--config.log_every=2 steps", processes=4, devices=1) as pod:
        assert pod.wait() == [0] * 4, pod.printed()
        assert "resumed at step 20" in pod.out(0)

    # Evaluation by its own program counts every example once, too.
    results = {}
    for processes in (1, 2):
        result = tmp_path / f"evaluation{processes}.json"
        program = [sys.executable, "-m", "convnext_jax.evaluate", "--weights", str(alone)]
        program += ["--dataset", "digits", "--batch_size", "40", "--json", str(result)]
        with Pod(None, processes=processes, devices=4 // processes, program=program) as pod:
            assert pod.wait() == [0] * processes, pod.printed()
        results[processes] = json.loads(result.read_text())
    assert results[2]["examples"] == results[1]["examples"] == 359
    for name in ("accuracy", "top5"):
        assert results[2][name] == results[1][name]
    np.testing.assert_allclose(results[2]["loss"], results[1]["loss"], rtol=1e-5)


def deviation(workdir, alone):
    ours, theirs = np.asarray(column(workdir, "loss")), np.asarray(column(alone, "loss"))
    return np.max(np.abs(ours / theirs - 1))


def test_goes_on_with_fewer_processes_and_another_mesh(quick, tmp_path, recording):
    """Four processes with fsdp 4, then two with fsdp 2, then one without."""
    # Wide enough that there are leaves to cut, and long enough for a second epoch to begin.
    fields = (*PLAIN, "--config.model.overrides.dims=(8, 64)", "--config.total=60 steps")
    steps_an_epoch = 1438 // 32
    alone, workdir = tmp_path / "alone", tmp_path / "elastic"
    with Pod(alone, *fields, processes=1, devices=4) as pod:
        assert pod.wait() == [0], pod.printed()

    read = {}
    start = 0
    for processes, stop in ((4, 12), (2, 30), (1, None)):
        recorded = recording(f"elastic{processes}")
        mesh = f"--config.mesh.fsdp={processes}"
        with Pod(
            workdir,
            *(*fields, mesh),
            processes=processes,
            devices=4 // processes,
            environment=recorded,
        ) as pod:
            if stop is None:
                assert pod.wait() == [0], pod.printed()
                end = 60
            else:
                pod.wait_until(lambda stop=stop: last_step(workdir) >= stop)
                pod.signal(processes - 1)
                assert pod.wait() == [75] * processes, pod.printed()
                end = last_step(workdir)
                assert stop <= end < 60
            assert f"fsdp {processes}" in pod.out(0)
            if start:
                assert f"resumed at step {start}" in pod.out(0)
        shares = [examples(recorded, i) for i in range(processes)]
        for step in range(start, end):  # what was read ahead of the stop was not trained on
            assert step not in read
            read[step] = [index for share in shares for index in share[step]]
        print(f"\n{processes} processes, fsdp {processes}: steps {start} to {end}")
        start = end

    assert sorted(read) == list(range(60))
    for epoch in (range(steps_an_epoch), range(steps_an_epoch, 60)):
        seen = [index for step in epoch for index in read[step]]
        assert len(seen) == len(set(seen)) == 32 * len(epoch)
    assert_trains_as(workdir, alone, 60, rtol=1e-3)
    print(f"60 losses within {deviation(workdir, alone):.1e} of an uninterrupted run's")


def test_a_notice_to_one_stops_all_at_one_step(quick, tmp_path):
    """And a restart goes on bit for bit; a notice in the middle of an evaluation, too."""
    # Small evaluation batches, so that there is a middle.
    fields = (*PLAIN, "--config.eval_batch_size=4")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with Pod(whole, *fields, processes=2, devices=2) as pod:
        assert pod.wait() == [0, 0], pod.printed()

    slow = customized(tmp_path / "slow", SLOW)

    def notice(victim, moment):
        with Pod(stopped, *fields, processes=2, devices=2, environment=slow) as pod:
            pod.wait_until(moment)
            pod.signal(victim, signal.SIGTERM)
            assert pod.wait() == [75, 75], pod.printed()
            said = pod.err(0), pod.err(1)
        assert said[0] == said[1]
        assert said[0].startswith("stopped: the platform announced")
        steps = [int(path.name) for path in (stopped / "checkpoints").iterdir()]
        assert f"that of step {max(steps)} in" in said[0]
        return max(steps)

    first = notice(1, lambda: last_step(stopped) >= 13)
    assert 13 <= first < 20
    # Step 20's losses are written right before it is evaluated.
    second = notice(0, lambda: last_step(stopped) >= 20)
    evaluated = [r["step"] for r in records(stopped) if r["kind"] == "eval"]
    assert second == 20
    assert evaluated == [10]
    with Pod(stopped, *fields, processes=2, devices=2) as pod:
        assert pod.wait() == [0, 0], pod.printed()
        assert "resumed at step 20" in pod.out(0)
    ours, theirs = records(stopped), records(whole)
    assert ours == theirs
    arrays, wanted = checkpoint(stopped, 40), checkpoint(whole, 40)
    for name, array in wanted.items():
        assert arrays[name].tobytes() == array.tobytes(), name
    print(
        f"\nSIGTERM to process 1 stopped both at step {first}, and to process 0 both while they "
        f"evaluated step {second}; then equal to the uninterrupted run, bit for bit: "
        f"{len(theirs)} records and {len(wanted)} arrays"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("--config.optim.learning_rate=1e30",), "the loss is"),
        (("--config.spike_factor=1.0", "--config.spike_steps=2"), "since step"),
    ],
)
def test_all_stop_at_the_step_that_went_astray(quick, tmp_path, fields, said):
    with Pod(tmp_path / "run", *PLAIN, *fields, processes=2, devices=2) as pod:
        assert pod.wait() == [1, 1], pod.printed()
        assert pod.err(0) == pod.err(1)
        assert pod.err(0).startswith("stopped: step ")
        assert said in pod.err(0)
        print(f"\nboth: {pod.err(0)}")


def test_a_checkpoint_that_cannot_be_written(quick, tmp_path):
    """All processes learn of it, and the one before stays."""
    workdir = tmp_path / "run"
    checkpoints, aside = workdir / "checkpoints", tmp_path / "aside"
    goes_on = "--config.on_save_failure=continue"
    with Pod(workdir, *PLAIN, goes_on, processes=2, devices=2) as pod:
        pod.wait_until(lambda: (checkpoints / "10").exists())
        checkpoints.rename(aside)
        checkpoints.write_text("in the way")
        pod.wait_until(lambda: "could not be written" in pod.out(0))
        checkpoints.unlink()
        aside.rename(checkpoints)
        assert pod.wait() == [0, 0], pod.printed()
        out = pod.out(0)
    assert f"{checkpoints} is no longer a directory; trying again at the next" in out
    assert (checkpoints / "10").exists() or (checkpoints / "40").exists()
    assert (checkpoints / "40").exists()

    workdir = tmp_path / "stops"
    checkpoints = workdir / "checkpoints"
    with Pod(workdir, *PLAIN, processes=2, devices=2) as pod:
        pod.wait_until(lambda: (checkpoints / "10").exists())
        checkpoints.rename(aside)
        checkpoints.write_text("in the way")
        assert pod.wait() == [1, 1], pod.printed()
        assert pod.err(0) == pod.err(1)
        assert "is no longer a directory" in pod.err(0)
    assert (aside / "10").exists()
