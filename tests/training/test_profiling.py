"""Which steps of a loop are traced, and what is said where none can be."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from traces import Trace

from convnext_jax import cli, train
from convnext_jax.errors import UserError
from convnext_jax.training.profiling import StepProfiler, check_steps, parse_steps


def test_the_steps_are_half_open():
    assert list(parse_steps("steps=10:15")) == [10, 11, 12, 13, 14]
    assert list(parse_steps("steps=2:3")) == [2]


@pytest.mark.parametrize(
    "text",
    ["10:15", "steps=10", "steps=15:10", "steps=10:10", "steps=1:3", "steps=-2:3", "steps=a:b"],
)
def test_other_values_are_refused_in_one_sentence(text, tmp_path, capsys):
    program = ["--config", "configs/digits.py", "--workdir", str(tmp_path / "run")]
    assert cli.run(train.main, [*program, "--profile", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --profile is {text!r}; write steps=FIRST:END, as steps=10:15")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_steps_that_the_run_does_not_have():
    check_steps(None, 20)
    check_steps(range(10, 21), 20)
    with pytest.raises(UserError, match=r"steps 10 to 21, but the run has 20; END can be 21"):
        check_steps(range(10, 22), 20)


@pytest.fixture
def loop(tmp_path):
    """A loop of empty steps; it gives what was told, and how often the clock was stopped."""
    step = jax.jit(lambda x: x + 1)

    def run(steps, start, end):
        told, pauses = [], []
        profiler = StepProfiler(
            steps,
            tmp_path,
            start_step=start,
            tell=told.append,
            pause=lambda: contextlib.nullcontext(pauses.append(None)),
        )
        state = jnp.zeros(())
        for number in range(start + 1, end + 1):
            with profiler.step(number, state):
                state = step(state)
            profiler.finish(number, state)
        profiler.close()
        return told, len(pauses)

    return run


def test_a_run_that_goes_on_traces_the_rest(loop, tmp_path):
    """Its own first step compiles, so it is left out."""
    told, pauses = loop(range(10, 15), 11, 16)
    assert list(Trace(tmp_path).steps) == [13, 14]
    assert pauses == 2
    assert told == [
        f"traced steps 13 to 14; to look at them: pip install xprof && xprof --logdir {tmp_path}"
    ]


def test_a_run_that_ends_early_writes_what_it_has(loop, tmp_path):
    told, _ = loop(range(2, 9), 0, 4)
    assert list(Trace(tmp_path).steps) == [2, 3, 4]
    assert told == []


def test_nothing_is_left_to_trace(loop, tmp_path):
    assert loop(None, 0, 3) == ([], 0)
    told, pauses = loop(range(10, 15), 14, 16)
    assert pauses == 0
    assert told == [
        "nothing is traced: steps 10 to 14 do not lie behind step 15, this start's first"
    ]
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_traces(loop, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert loop(range(2, 4), 0, 5) == ([], 0)
    assert list(tmp_path.iterdir()) == []
