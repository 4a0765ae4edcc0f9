import flax.linen as nn
import numpy as np

from convnext_jax.analysis.throughput import Spread, inference_call, seconds_in_turns


class Clock:
    """Time that passes only while a call runs."""

    def __init__(self, **seconds):
        self.now, self.log = 0.0, []
        self.calls = {name: self._call(name, each) for name, each in seconds.items()}

    def _call(self, name, seconds):
        def call():
            self.log.append(name)
            # The first run compiles, say.
            self.now += seconds * (10 if self.log.count(name) == 1 else 1)

        return call


def test_calls_take_turns_and_warming_up_counts_nothing():
    clock = Clock(slow=2.0, fast=0.25)
    seconds = seconds_in_turns(clock.calls, 3, turn_seconds=1.0, clock=lambda: clock.now)
    assert seconds == {"slow": [2.0] * 3, "fast": [0.25] * 3}
    warm_up, turns = clock.log[:4], clock.log[4:]
    assert warm_up == ["slow", "slow", "fast", "fast"]
    # A fast one runs as often as fills its turn, and each round begins with another.
    assert turns == ["slow"] + ["fast"] * 4 + ["fast"] * 4 + ["slow"] + ["slow"] + ["fast"] * 4


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(2.5, 1.0, 9.0)


class Linear(nn.Module):
    """A network that costs nothing to compile."""

    @nn.compact
    def __call__(self, images, train=False):
        assert not train
        return nn.Dense(7)(images.mean(axis=(1, 2)))


def test_the_call_is_the_forward_pass():
    logits = np.asarray(inference_call(Linear(), 4, 2)())
    assert logits.shape == (2, 7)
    # One linear map of two different images.
    assert not np.allclose(logits[0], logits[1])
    assert np.isfinite(logits).all()
