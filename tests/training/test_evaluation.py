"""Evaluation is exact: every example counts once, whatever the batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.loader import eval_loader, eval_steps
from convnext_jax.data.sources import open_source
from convnext_jax.data.transforms import ResizeEvalTransform
from convnext_jax.errors import UserError
from convnext_jax.training.evaluation import evaluate
from convnext_jax.training.sharding import batch_sharding, create_mesh, prefetch_to_device
from convnext_jax.training.step import make_eval_step


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(10)(images.reshape(images.shape[0], -1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source("digits", "validation", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def wanted(source):
    """The metrics by NumPy, image by image."""
    variables = Linear().init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    dense = variables["params"]["Dense_0"]
    kernel, bias = (np.asarray(dense[k], np.float64) for k in ("kernel", "bias"))
    transform = ResizeEvalTransform(8, interpolation="bicubic")
    hits, near, losses = 0, 0, 0.0
    for i in range(len(source)):
        pixels = transform(source[i].image).astype(np.float64) / 255
        logits = ((pixels - 0.5) / 0.25).reshape(-1) @ kernel + bias
        order = np.argsort(-logits)
        hits += int(order[0] == source[i].label)
        near += int(source[i].label in order[:5])
        losses += np.log(np.exp(logits).sum()) - logits[source[i].label]
    count = len(source)
    return variables, {
        "accuracy": hits / count,
        "top5": near / count,
        "loss": losses / count,
        "examples": count,
    }


@pytest.mark.parametrize("batch_size", [360, 104, 16])
def test_any_batch_size_gives_the_whole_split(source, wanted, batch_size):
    variables, metrics = wanted
    assert len(source) % batch_size, "a full last batch would show nothing"
    on = batch_sharding(create_mesh())
    step = jax.jit(make_eval_step(Linear(), mean=(0.5,) * 3, std=(0.25,) * 3))
    transform = ResizeEvalTransform(8, interpolation="bicubic")
    host = eval_loader(source, transform, batch_size=batch_size)
    seen = []

    def counted(batches):
        for batch in batches:
            seen.append(batch["image"].shape[0])
            yield batch

    found = evaluate(
        step, variables, counted(prefetch_to_device(host, on, ("image", "label", "mask")))
    )
    host.close()
    assert seen == [batch_size] * eval_steps(len(source), batch_size)
    assert found["accuracy"] == metrics["accuracy"]
    assert found["top5"] == metrics["top5"]
    assert found["examples"] == metrics["examples"] == 359
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert 0 < found["accuracy"] < found["top5"] < 1


def batch(mask):
    size = len(mask)
    return {
        "image": jnp.zeros((size, 8, 8, 3), jnp.uint8),
        "label": jnp.zeros(size, jnp.int32),
        "mask": jnp.asarray(mask, jnp.float32),
    }


def test_a_split_that_holds_nothing(wanted):
    variables, _ = wanted
    step = make_eval_step(Linear())
    for batches in ([], [batch([0, 0])], [batch([0, 0]), batch([0, 0])]):
        with pytest.raises(UserError, match="no image that can be read"):
            evaluate(step, variables, batches)
    assert evaluate(step, variables, [batch([0, 0]), batch([0, 1])])["examples"] == 1


def test_a_model_that_is_not_finite_scores_no_hit(wanted):
    variables = jax.tree.map(lambda x: x * jnp.nan, wanted[0])
    found = evaluate(make_eval_step(Linear()), variables, [batch([1, 1, 0])])
    assert found["accuracy"] == found["top5"] == 0
    assert np.isnan(found["loss"])
    assert found["examples"] == 2


@pytest.mark.parametrize("at", [1, 3, None])
def test_an_evaluation_may_be_interrupted_after_each_batch(wanted, at):
    taken, asked = [], []

    def batches():
        for number in (1, 2, 3):
            taken.append(number)
            yield batch([1, 1])

    def interrupted():
        asked.append(len(taken))
        return len(asked) == at

    found = evaluate(make_eval_step(Linear()), wanted[0], batches(), interrupted=interrupted)
    if at is None:
        assert found["examples"] == 6
    else:
        assert found is None
    # Processes must ask equally often.
    assert taken == asked == [1, 2, 3][:at]
