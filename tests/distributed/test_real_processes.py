"""Real processes under JAX: whichever of them ends, and however, the others end soon, and say why.

One that is killed must not leave them in a collective operation, and the one that hosts JAX's
service must not take them down by an abort.
"""

import signal
import textwrap
import time

import pytest
from pod import Pod, python

pytestmark = pytest.mark.slow

PROGRAM = """
    import argparse, sys, time
    import jax
    import numpy as np

    from convnext_jax import cli
    from convnext_jax.distributed import joining
    from convnext_jax.errors import RunInterruptedError, UserError

    def main(argv):
        parser = argparse.ArgumentParser()
        joining.add_arguments(parser)
        parser.add_argument("--steps", type=int, default=10_000)
        parser.add_argument("--fails", type=int)
        parser.add_argument("--late", type=int)
        parser.add_argument("--error")
        arguments = parser.parse_args(argv)
        with joining.joined(arguments):
            from jax.experimental import multihost_utils

            for step in range(arguments.steps):
                every = multihost_utils.process_allgather(np.asarray(jax.process_index()))
                assert every.tolist() == list(range(arguments.num_processes))
                if step == 0:
                    print("started", flush=True)
                if step == 5 and arguments.error == "interrupted":
                    raise RunInterruptedError("saved at step 5")
                if step == 5 and arguments.fails == jax.process_index():
                    raise {"user": UserError, "other": ZeroDivisionError}[arguments.error]("no x")
                time.sleep(0.02)
            print("at the end", flush=True)
            if arguments.late == jax.process_index():
                time.sleep(60)

    sys.exit(cli.run(main))
"""


@pytest.fixture
def pod(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    pods = []

    def start(processes, *arguments):
        program = python(str(script), *arguments)
        pods.append(Pod(tmp_path, processes=processes, devices=1, program=program))
        return pods[-1]

    yield start
    for one in pods:
        one.__exit__()


def until_all_print(run, word):
    run.wait_until(lambda: all(word in run.out(i) for i in range(len(run.processes))))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["in the middle", "at the end"])
def test_one_that_is_killed_ends_all(pod, victim, moment):
    late = (victim + 1) % 3
    run = pod(3, *(() if moment == "in the middle" else ("--steps=10", f"--late={late}")))
    until_all_print(run, "started" if moment == "in the middle" else "at the end")
    time.sleep(0.5)
    killed = time.monotonic()
    run.signal(victim, signal.SIGKILL)
    statuses = run.wait(60)
    assert time.monotonic() - killed < 15
    assert statuses.pop(victim) == -signal.SIGKILL
    assert statuses == [75, 75]
    for process in {0, 1, 2} - {victim}:
        last = run.err(process).splitlines()[-1]
        assert last.startswith(f"stopped: process {victim} of 3 (")
        assert last.endswith(
            "ended without a word: it was killed, or its host has failed; start all processes "
            "again with the same command, and training goes on from its last checkpoint"
        )
        assert "Traceback" not in run.err(process)
        assert "stack trace" not in run.err(process)


@pytest.mark.parametrize("process", [0, 2])
def test_a_mistake_of_one_ends_all_with_its_message(pod, process):
    run = pod(3, f"--fails={process}", "--error=user")
    assert run.wait(60) == [2, 2, 2]
    for other in range(3):
        [line] = run.err(other).splitlines()
        if other == process:
            assert line == "error: no x"
        else:
            assert line.startswith(f"stopped: process {process} of 3 (")
            assert line.endswith(") stopped: no x")


def test_a_fault_of_one_ends_all(pod):
    run = pod(2, "--fails=1", "--error=other")
    assert run.wait(60) == [1, 1]
    assert run.err(1).splitlines()[-1] == "ZeroDivisionError: no x"
    assert run.err(0).endswith(") stopped: ZeroDivisionError: no x; see its own messages\n")


def test_all_come_to_the_end_together(pod):
    run = pod(2, "--steps=5")
    assert run.wait(60) == [0, 0]
    assert [run.err(i) for i in range(2)] == ["", ""]
    assert [run.out(i) for i in range(2)] == ["started\nat the end\n"] * 2


def test_all_are_interrupted_together(pod):
    run = pod(2, "--error=interrupted")
    assert run.wait(60) == [75, 75]
    assert [run.err(i) for i in range(2)] == ["stopped: saved at step 5\n"] * 2
