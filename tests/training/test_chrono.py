"""The chrono's arithmetic, with a clock that stands still until a test moves it."""

import contextlib
import json

import pytest

from convnext_jax.training.chrono import Chrono, Window


class Clock:
    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def step_with(clock, chrono, compute, wait=0.0):
    with chrono.waiting_for_data():
        clock.pass_(wait)
    clock.pass_(compute)


def test_compilation_and_pauses_do_not_count(clock):
    chrono = Chrono(clock=clock)
    step_with(clock, chrono, compute=30.0, wait=5.0)
    first = chrono.lap(1)
    assert (first.compiling, first.seconds) == (True, 35.0)
    assert first.seconds_per_step is None
    assert first.wait_fraction is None
    assert chrono.wait_fraction is None
    assert chrono.time_left(1, 100) is None

    for _ in range(10):
        step_with(clock, chrono, compute=0.75, wait=0.25)
    with chrono.pause():
        clock.pass_(50.0)
        with chrono.waiting_for_data(), chrono.pause():  # an evaluation draws batches, and may save
            clock.pass_(50.0)
    window = chrono.lap(11)
    assert (window.steps, window.seconds, window.waited) == (10, 10.0, 2.5)
    assert window.seconds_per_step == 1.0
    assert window.wait_fraction == 0.25
    assert chrono.time_left(11, 100) == 89.0
    assert chrono.wait_fraction == 0.25
    assert chrono.time_left(120, 100) == 0.0
    assert chrono.wall_seconds == 145.0
    assert (chrono.train_seconds, chrono.train_steps) == (10.0, 10)


def test_the_time_left_is_the_mean_over_this_start(clock):
    chrono = Chrono(clock=clock)
    chrono.lap(1)
    clock.pass_(10.0)
    chrono.lap(11)
    clock.pass_(30.0)
    assert chrono.lap(21).seconds_per_step == 3.0
    assert chrono.time_left(21, 31) == 20.0


def test_a_restart_goes_on_from_the_state(clock):
    chrono = Chrono(clock=clock)
    clock.pass_(20.0)
    chrono.lap(1)
    clock.pass_(8.0)
    chrono.lap(5)
    clock.pass_(2.0)
    state = json.loads(json.dumps(chrono.state()))
    assert state == {
        "train_seconds": 8.0,
        "train_steps": 4,
        "wait_seconds": 0.0,
        "wall_seconds": 30.0,
    }

    later = Clock(now=7.0)
    chrono = Chrono(5, state, clock=later)
    assert chrono.time_left(5, 10) == 10.0
    later.pass_(25.0)
    assert chrono.lap(6).compiling
    assert chrono.time_left(6, 10) == 8.0
    later.pass_(2.0)
    chrono.lap(8)
    # The new machine is twice as fast, and tells so at once.
    assert chrono.time_left(8, 10) == 2.0
    assert chrono.state() == {
        "train_seconds": 10.0,
        "train_steps": 6,
        "wait_seconds": 0.0,
        "wall_seconds": 57.0,
    }


def test_a_pause_ends_with_its_exception(clock):
    chrono = Chrono(clock=clock)
    chrono.lap(1)
    with contextlib.suppress(RuntimeError), chrono.pause():
        clock.pass_(5.0)
        raise RuntimeError
    clock.pass_(1.0)
    assert chrono.lap(2).seconds == 1.0


def test_ticks_between_laps_change_nothing_but_the_state(clock):
    chrono = Chrono(clock=clock)
    for step in range(1, 4):
        clock.pass_(10.0)
        chrono.tick(step)
    clock.pass_(1.0)
    assert chrono.lap(3) == Window(steps=3, seconds=31.0, waited=0.0, compiling=True)
    for step in range(4, 8):
        step_with(clock, chrono, compute=1.5, wait=0.5)
        chrono.tick(step)
    assert chrono.state()["train_steps"] == 4
    assert chrono.wait_fraction == 0.25
    with chrono.pause():
        clock.pass_(9.0)
    clock.pass_(2.0)
    assert chrono.lap(7) == Window(steps=4, seconds=10.0, waited=2.0, compiling=False)
    assert chrono.state() == {
        "train_seconds": 10.0, "train_steps": 4, "wait_seconds": 2.0, "wall_seconds": 50.0
    }  # fmt: skip
