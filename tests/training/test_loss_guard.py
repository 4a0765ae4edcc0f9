"""The guard stops a run at a loss that is not finite or stays high, and at nothing else."""

import json
import math

import numpy as np
import pytest

from convnext_jax.training.loss_guard import LossGuard


def metrics(loss, norm=1.0):
    return {
        "loss": loss,
        "grad_norm": norm,
        "finite": math.isfinite(loss) and math.isfinite(norm),
    }


def verdicts(guard, losses, start=0):
    return [guard.check(done, metrics(loss)) for done, loss in enumerate(losses, start + 1)]


def test_a_loss_that_is_not_finite():
    guard = LossGuard(stop_at_nonfinite=True)
    assert guard.check(1, metrics(2.5)) is None
    assert guard.check(2, metrics(math.nan)) == "step 2: the loss is nan, the gradient's norm 1"
    assert (
        guard.check(3, metrics(2.0, math.inf)) == "step 3: the loss is 2, the gradient's norm inf"
    )


def test_it_may_be_left_to_the_step():
    guard = LossGuard(stop_at_nonfinite=False, spike_factor=1.5, spike_steps=1)
    assert verdicts(guard, [1.0, math.nan, math.inf, 1.0]) == [None] * 4
    # Nor has it touched the average.
    assert "running average of 1;" in guard.check(5, metrics(2.0))


def test_without_a_factor_any_finite_loss_is_good():
    guard = LossGuard(stop_at_nonfinite=True, spike_steps=1)
    assert verdicts(guard, [1.0, 1e30, 1e-30, 1e38]) == [None] * 4


def test_a_spike_of_so_many_steps():
    guard = LossGuard(stop_at_nonfinite=True, spike_factor=2.0, spike_steps=3)
    assert verdicts(guard, [1.0] * 10 + [2.5, 3.0]) == [None] * 12
    assert guard.check(13, metrics(4.0)) == (
        "step 13: since step 11 the loss has been more than 2 times its running average of 1; it "
        "is 4"
    )


def test_short_spikes_are_forgiven_and_do_not_add_up():
    guard = LossGuard(stop_at_nonfinite=True, spike_factor=2.0, spike_steps=3)
    assert verdicts(guard, [1.0, 5.0, 5.0, 1.0] * 50) == [None] * 200


def test_exactly_the_factor_is_no_spike():
    guard = LossGuard(stop_at_nonfinite=True, spike_factor=2.0, spike_steps=1)
    assert verdicts(guard, [1.0, 2.0]) == [None, None]


def test_a_spike_does_not_become_the_rule():
    guard = LossGuard(stop_at_nonfinite=True, spike_factor=2.0, spike_steps=1000)
    found = verdicts(guard, [1.0] * 5 + [10.0] * 1000)
    assert found[:-1] == [None] * 1004
    assert "since step 6 " in found[-1]
    assert "running average of 1;" in found[-1]


def test_steps_left_out_within_a_spike_do_not_move_its_beginning():
    guard = LossGuard(stop_at_nonfinite=False, spike_factor=2.0, spike_steps=3)
    found = verdicts(guard, [1.0, 1.0, 9.0, math.nan, 9.0, math.inf, 9.0])
    assert found[:-1] == [None] * 6
    assert found[-1].startswith("step 7: since step 3 the loss has been more than 2 times")


def test_the_average_is_weighted_and_unbiased():
    losses = np.linspace(5.0, 1.0, 200)
    guard = LossGuard(stop_at_nonfinite=True, spike_factor=100.0, spike_steps=1)
    assert verdicts(guard, losses) == [None] * 200
    weights = 0.98 ** np.arange(199, -1, -1)
    mean = np.average(losses, weights=weights)
    assert f"running average of {mean:.4g};" in guard.check(201, metrics(1e9))


def test_a_falling_loss_is_followed():
    """A spike is one against the last fifty steps, not against the run's beginning."""
    guard = LossGuard(stop_at_nonfinite=True, spike_factor=2.0, spike_steps=1)
    assert verdicts(guard, [7.0] * 5 + [1.0] * 500) == [None] * 505
    assert guard.check(506, metrics(3.0)) is not None


@pytest.mark.parametrize("cut", [1, 30, 52, 54, 55, 57, 80])
def test_a_run_that_was_stopped_comes_to_the_same_verdicts(cut):
    rng = np.random.default_rng(3)
    losses = rng.uniform(0.9, 1.1, size=100)
    losses[52:58] *= 3.0
    losses[55] = math.nan
    losses[90:] *= 3.0
    settings = {"stop_at_nonfinite": False, "spike_factor": 2.0, "spike_steps": 6}
    wanted = verdicts(LossGuard(**settings), losses)
    assert [i for i, found in enumerate(wanted, 1) if found] == [96, 97, 98, 99, 100]

    guard = LossGuard(**settings)
    found = verdicts(guard, losses[:cut])
    state = json.loads(json.dumps(guard.state()))
    found += verdicts(LossGuard(**settings, state=state), losses[cut:], start=cut)
    assert found == wanted


def test_the_state_is_a_copy():
    guard = LossGuard(stop_at_nonfinite=True)
    state = guard.state()
    guard.check(1, metrics(1.0))
    assert state != guard.state()
    LossGuard(stop_at_nonfinite=True, state=state).check(1, metrics(1.0))
    assert state["weights"] == 0.0
