"""Metrics wait on the devices, are summed up in reports, and survive a stop in between."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.training.step_log import StepLog


def metrics(loss, *, norm=1.0, rate=0.1, finite=None):
    finite = math.isfinite(loss) and math.isfinite(norm) if finite is None else finite
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(norm),
        "learning_rate": jnp.float32(rate),
        "finite": jnp.bool_(finite),
    }


def test_what_is_fetched_is_plain_and_comes_once():
    log = StepLog()
    log.append(1, metrics(0.1, norm=2.0, rate=1e-3))
    log.append(2, metrics(float("nan"), norm=float("inf")))
    fetched = log.fetch()
    assert [done for done, _ in fetched] == [1, 2]
    first, second = (values for _, values in fetched)
    # The very float32, as a float.
    assert first == {
        "loss": float(np.float32(0.1)),
        "grad_norm": 2.0,
        "learning_rate": float(np.float32(1e-3)),
        "finite": True,
    }
    assert {type(value) for value in first.values()} == {float, bool}
    assert math.isnan(second["loss"])
    assert second["grad_norm"] == math.inf
    assert second["finite"] is False
    assert log.fetch() == []
    log.append(3, metrics(1.0))
    assert [done for done, _ in log.fetch()] == [3]


def test_a_report_sums_up_and_forgets():
    log = StepLog()
    for done, (loss, norm, rate) in enumerate([(1.0, 5.0, 0.1), (2.0, 6.0, 0.2)], 1):
        log.append(done, metrics(loss, norm=norm, rate=rate))
    log.fetch()
    for done, (loss, norm) in enumerate([(6.0, 7.0), (math.nan, 8.0), (4.0, math.inf)], 3):
        log.append(done, metrics(loss, norm=norm, rate=0.5))
    log.fetch()
    report = log.report()
    assert (report.done, report.steps, report.left_out) == (5, 5, [4, 5])
    # The mean over the finite ones; of these the last one's norm; the rate of the very last step.
    assert report.metrics == {"loss": 3.0, "grad_norm": 7.0, "learning_rate": 0.5}
    assert log.state() == []
    log.append(6, metrics(10.0))
    log.fetch()
    assert (log.report().done, log.state()) == (6, [])


def test_a_report_on_nothing_finite():
    log = StepLog()
    log.append(7, metrics(math.nan, rate=0.25))
    log.fetch()
    report = log.report()
    assert report.left_out == [7]
    assert math.isnan(report.metrics["loss"])
    assert math.isnan(report.metrics["grad_norm"])
    assert report.metrics["learning_rate"] == 0.25


def test_what_was_not_reported_goes_through_a_checkpoint():
    losses = np.random.default_rng(0).normal(size=9).astype(np.float32)
    losses[4] = np.nan
    whole, stopped = StepLog(), StepLog()
    for done, loss in enumerate(losses, 1):
        for log in (whole, stopped):
            log.append(done, metrics(loss))
        if done == 6:
            stopped.fetch()
            state = json.loads(json.dumps(stopped.state()))
            stopped = StepLog(state)
    whole.fetch()
    assert len(stopped.fetch()) == 3
    ours, theirs = stopped.report(), whole.report()
    assert ours == theirs
    assert ours.steps == 9
    assert ours.left_out == [5]


def test_the_state_is_a_copy():
    log = StepLog()
    log.append(1, metrics(1.0))
    log.fetch()
    state = log.state()
    log.report()
    assert len(state) == 1


@pytest.mark.parametrize(("in_flight", "waited_for"), [(0, 3), (1, 2), (2, 1), (3, None)])
def test_no_more_than_so_many_steps_are_in_flight(monkeypatch, in_flight, waited_for):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda values: waited.append(values["loss"]))
    log = StepLog()
    for done in (1, 2, 3):
        log.append(done, metrics(float(done)))
    log.hold_back(in_flight)
    assert waited == ([] if waited_for is None else [waited_for])
    log.fetch()
    log.hold_back(in_flight)
    assert len(waited) == (waited_for is not None)
