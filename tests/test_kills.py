"""One of two processes is killed again and again, at any moment: nothing hangs, nothing is lost."""

import json
import random
import re
import signal
import time

import pytest
from pod import Pod
from runs import assert_bitwise_equal, checkpoint, records

pytest_plugins = ["run_fixtures"]

BOUND = 30  # seconds within which the other process must have ended
FIELDS = (
    "--config.augment.policy=",
    "--config.augment.erasing_prob=0",
    "--config.checkpoint_every=5 steps",
    "--config.eval_every=20 steps",
    "--join_timeout=15",
)


def whole(workdir):
    """The newest checkpoint that bears its own name, as Orbax gives it at the end."""
    return max((int(p.name) for p in names(workdir) if p.name.isdecimal()), default=0)


def names(workdir):
    checkpoints = workdir / "checkpoints"
    return list(checkpoints.iterdir()) if checkpoints.exists() else []


def half_written(workdir):
    return any(".orbax-checkpoint-tmp" in path.name for path in names(workdir))


def in_its_loop(pod, newest):
    """Whether it has come further than the run before it, so that all of them come to an end."""
    return whole(pod.workdir) > newest


def in_a_save(pod, newest):
    """Halts process 0 where a checkpoint is half-written, so that the kill falls right there."""
    if not in_its_loop(pod, newest) or not half_written(pod.workdir):
        return False
    pod.signal(0, signal.SIGSTOP)
    if half_written(pod.workdir):
        return True
    pod.signal(0, signal.SIGCONT)
    return False


@pytest.mark.parametrize(
    "kills",
    [pytest.param(5, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.nightly)],
)
def test_killed_again_and_again(quick, tmp_path, kills):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    steps = 30 * kills
    fields = (*FIELDS, f"--config.total={steps} steps")
    with Pod(reference, *fields, processes=2, devices=2) as pod:
        assert pod.wait() == [0, 0], pod.printed()

    dice = random.Random(0)
    slowest, newest, log = 0.0, 0, []
    moments = ["starting"] * (kills // 5) + ["in a save"] * (kills // 4)
    moments += ["in the loop"] * (kills - len(moments))
    dice.shuffle(moments)
    for moment in moments:
        victim = dice.randrange(2)
        with Pod(workdir, *fields, processes=2, devices=2) as pod:
            if moment == "starting":
                time.sleep(dice.uniform(0.0, 8.0))
            elif moment == "in a save":
                pod.wait_until(lambda pod=pod, newest=newest: in_a_save(pod, newest))
            else:
                pod.wait_until(lambda pod=pod, newest=newest: in_its_loop(pod, newest))
                time.sleep(dice.uniform(0.0, 0.7))
            torn = half_written(workdir)
            if moment == "in a save":
                victim = 0
            pod.signal(victim, signal.SIGKILL)
            killed = time.monotonic()
            other = 1 - victim
            statuses = pod.wait(BOUND)
            seconds = time.monotonic() - killed
            said, out = pod.err(other), pod.out(0)
        assert statuses[victim] == -signal.SIGKILL, "the run ended before it was killed"
        assert statuses[other] == 75, said
        lines = [line for line in said.splitlines() if line.startswith("stopped: ")]
        assert len(lines) == 1, said
        if moment != "starting":  # else it may not have come to the meeting yet
            assert f"process {victim} of 2" in lines[0]
            assert "ended without a word" in lines[0]
        assert_resumed_at(out, newest, moment)
        newest = whole(workdir)
        if moment != "starting":
            slowest = max(slowest, seconds)
        log.append({"moment": moment, "victim": victim, "torn": torn, "newest": newest})

    with Pod(workdir, *fields, processes=2, devices=2) as pod:
        assert pod.wait() == [0, 0], pod.printed()
        assert_resumed_at(pod.out(0), newest, "to its end")
    assert records(workdir) == records(reference)
    assert_bitwise_equal(checkpoint(workdir, steps), checkpoint(reference, steps))
    assert sum(entry["torn"] for entry in log) >= kills // 4
    assert len({entry["newest"] for entry in log}) >= kills - kills // 5
    print(
        f"\n{kills} kills, {sum(entry['torn'] for entry in log)} of them during the write of a "
        f"checkpoint; the other process ended with status 75, within {slowest:.1f} s of a kill "
        f"after the start; newest checkpoints {[entry['newest'] for entry in log]}; then equal to "
        "a run that was never killed, bit for bit"
    )
    print(json.dumps(log))


def assert_resumed_at(out, newest, moment):
    """Nothing but the steps since the newest whole checkpoint is done again."""
    found = re.search(r"workdir .*, (a new run|resumed at step ([\d,]+))", out)
    if found is None:
        assert moment == "starting", out
        return
    assert int((found[2] or "0").replace(",", "")) == newest
