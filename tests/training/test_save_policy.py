"""A checkpoint that can't be written stops the run or not, and never costs the ones before it."""

import os
import subprocess
import sys
import textwrap
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.errors import ProcessFailedError, RunInterruptedError, RunStoppedError
from convnext_jax.training import checkpoint_room
from convnext_jax.training.checkpoints import Checkpointer, SaveError
from convnext_jax.training.save_policy import SavePolicy

Usage = namedtuple("Usage", "total used free")


def state(step):
    return {"w": jnp.full((4, 8), step, jnp.float32), "step": jnp.int32(step)}


def restored(checkpointer):
    """The newest whole checkpoint's step, once its arrays were found to be that step's."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    found = checkpointer.restore(abstract)
    np.testing.assert_array_equal(found.state["w"], state(found.step)["w"])
    assert found.state["step"] == found.step
    assert found.metadata == {"at": found.step}
    return found.step


class Run:
    """A run's checkpoints and what its console was told."""

    def __init__(self, directory, on_failure):
        self.directory, self.on_failure = directory, on_failure
        self.checkpointer = Checkpointer(directory)
        self.told = []
        self.again()

    def again(self):
        """The policy of a run that starts anew, with all that was on the disk."""
        self.saves = SavePolicy(
            self.checkpointer, on_failure=self.on_failure, tell=self.told.append
        )

    def save(self, step, **options):
        self.saves.save(step, state(step), metadata={"at": step}, metrics=None, **options)


@pytest.fixture(params=["stop", "continue"])
def run(request, tmp_path, capfd):
    run = Run(tmp_path / "checkpoints", request.param)
    run.save(1)
    run.saves.wait()
    yield run
    run.checkpointer.close()
    # Whoever reads the console finds what `tell` and the exceptions say, and nothing else.
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def full(monkeypatch):
    """A disk that is full, until it is told otherwise."""
    usage = [Usage(1, 1, 7)]
    real = checkpoint_room.shutil.disk_usage
    monkeypatch.setattr(
        checkpoint_room.shutil, "disk_usage", lambda path: usage[0] if usage else real(path)
    )
    return usage


def fails(run, step, reason):
    """A save that can't be begun is told of in the way that the config chose."""
    sentence = f"the checkpoint of step {step} could not be written: {reason}"
    if run.on_failure == "continue":
        run.save(step)
        assert run.told == [f"{sentence}; trying again at the next checkpoint"]
        return
    with pytest.raises(RunStoppedError) as caught:
        run.save(step)
    assert type(caught.value) is RunStoppedError
    assert str(caught.value) == (
        f"{sentence}; the last good checkpoint is that of step 1 in {run.directory}. Mend that and "
        "give the same command again, or --config.on_save_failure=continue to go on without"
    )
    assert run.told == []


def goes_on(run):
    """The checkpoint before is whole, and the next one can be written."""
    assert run.checkpointer.all_steps() == [1]
    assert restored(run.checkpointer) == 1
    run.again()
    run.save(3)
    run.saves.wait()
    assert run.checkpointer.all_steps() == [1, 3]
    assert restored(run.checkpointer) == 3
    with Checkpointer(run.directory) as anew:
        assert restored(anew) == 3


def test_a_full_disk(run, full):
    fails(run, 2, f"it takes up to 0 MiB, and 0 MiB are free in {run.directory}")
    full.clear()
    goes_on(run)


def test_a_directory_that_has_become_a_file(run, tmp_path):
    run.directory.rename(tmp_path / "away")
    run.directory.write_text("")
    if run.on_failure == "stop":
        with pytest.raises(RunStoppedError, match=f"{run.directory} is no longer a directory; "):
            run.save(2)
    else:
        run.save(2)
        [line] = run.told
        assert f"{run.directory} is no longer a directory; trying again" in line
    run.directory.unlink()
    (tmp_path / "away").rename(run.directory)
    goes_on(run)


def test_the_last_checkpoint_must_not_fail(run, full):
    full.clear()
    run.save(2, last=True)
    full.append(Usage(1, 1, 7))
    with pytest.raises(RunStoppedError, match=r"of step 3 .* that of step 2 in"):
        run.save(3, last=True)
    assert run.told == []


def test_the_end_waits_for_the_save_under_way(run):
    run.save(2)
    error = run.saves.interruption()
    assert type(error) is RunInterruptedError
    assert str(error) == (
        "the platform announced that it will end this run; the last good checkpoint is that of "
        f"step 2 in {run.directory}. The same command goes on from it"
    )
    assert os.path.isdir(run.directory / "2")
    run.save(3)
    error = run.saves.stop("step 3: the loss is nan")
    assert type(error) is RunStoppedError
    assert str(error).startswith(
        f"step 3: the loss is nan; the last good checkpoint is that of step 3 in {run.directory}. "
        "Start again with --allow_config_change and a lower --config.optim.learning_rate, or"
    )
    assert os.path.isdir(run.directory / "3")


def test_an_end_before_the_first_checkpoint(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        saves = SavePolicy(checkpointer, on_failure="stop", tell=print)
        assert "run; no checkpoint had been written yet. " in str(saves.interruption())
        assert "nan; no checkpoint had been written yet. " in str(saves.stop("loss is nan"))


class Failing:
    """A checkpointer whose saves fail, as one of several processes sees it."""

    directory = "here"

    def __init__(self, *, agreed):
        self.error = SaveError("the checkpoint of step 4 could not be written: EIO", agreed=agreed)

    def wait(self):
        error, self.error = self.error, None
        if error is not None:
            raise error

    def save(self, step, state, *, metadata, metrics):
        return True

    def latest_step(self):
        return 2


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
@pytest.mark.parametrize("action", ["save", "wait", "interruption"])
def test_a_failure_that_the_others_do_not_know_of_ends_the_run(on_failure, action):
    """They would wait for this process in the next save."""
    told = []
    saves = SavePolicy(Failing(agreed=False), on_failure=on_failure, tell=told.append)
    act = {"save": lambda: saves.save(6, {}, metadata={}, metrics=None)}
    with pytest.raises(
        ProcessFailedError, match=r"step 4 .*EIO; the last good checkpoint is that of step 2"
    ):
        act.get(action, getattr(saves, action))()
    assert told == []


@pytest.mark.parametrize("action", ["save", "wait"])
def test_the_failure_of_the_save_before_is_told_once(action):
    told = []
    saves = SavePolicy(Failing(agreed=True), on_failure="continue", tell=told.append)
    act = {"save": lambda: saves.save(6, {}, metadata={}, metrics=None)}
    act.get(action, saves.wait)()
    saves.wait()
    assert told == [
        "the checkpoint of step 4 could not be written: EIO; trying again at the next checkpoint"
    ]


def test_a_run_gone_astray_tells_of_a_failed_save_too():
    saves = SavePolicy(Failing(agreed=True), on_failure="stop", tell=print)
    assert str(saves.stop("step 5: the loss is nan")).startswith(
        "step 5: the loss is nan; the checkpoint of step 4 could not be written: EIO; the last good"
    )


WRITES = """
    import os, resource, signal, sys

    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax, numpy as np
    from convnext_jax.errors import RunStoppedError
    from convnext_jax.training.checkpoints import Checkpointer
    from convnext_jax.training.save_policy import SavePolicy

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def policy(on_failure):
        return SavePolicy(checkpointer, on_failure=on_failure, tell=print)

    def save(step):
        saves.save(step, {"w": arrays[step]}, metadata={"at": step}, metrics=None)

    def newest():
        abstract = jax.ShapeDtypeStruct((500, 500), np.float32, sharding=arrays[1].sharding)
        found = checkpointer.restore({"w": abstract})
        assert np.asarray(found.state["w"]).tobytes() == np.asarray(arrays[found.step]).tobytes()
        print("restored", found.step, found.metadata, checkpointer.all_steps())

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rng = np.random.default_rng(0)
    # Numbers that don't compress: 1 MB each.
    arrays = [jax.device_put(rng.normal(size=(500, 500)).astype(np.float32)) for _ in range(8)]
    with Checkpointer(sys.argv[1]) as checkpointer:
        saves = policy("continue")
        save(1)
        saves.wait()
        limit(100_000)
        save(2)  # fails in the background
        saves.wait()
        newest()
        limit(resource.RLIM_INFINITY)
        save(3)
        saves.wait()
        newest()
        saves = policy("stop")
        limit(100_000)
        save(4)
        try:
            save(5)
        except RunStoppedError as error:
            print(error)
        newest()
        limit(resource.RLIM_INFINITY)
        saves = policy("stop")
        save(5)
        saves.wait()
        newest()
"""


def test_a_write_that_fails_in_the_background(tmp_path):
    """The kernel refuses to let files grow, as at a quota. A limit of the whole process."""
    directory = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITES), str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    failed = "the checkpoint of step {} could not be written: "
    assert lines[0].startswith(failed.format(2))
    assert lines[0].endswith("; trying again at the next checkpoint")
    assert lines[1] == "restored 1 {'at': 1} [1]"
    assert lines[2] == "restored 3 {'at': 3} [1, 3]"
    assert lines[3].startswith(failed.format(4))
    assert lines[3].endswith(
        f"; the last good checkpoint is that of step 3 in {directory}. Mend that and give the same "
        "command again, or --config.on_save_failure=continue to go on without"
    )
    assert lines[4] == "restored 3 {'at': 3} [1, 3]"
    assert lines[5] == "restored 5 {'at': 5} [1, 3, 5]"
