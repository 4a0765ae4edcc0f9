"""What each example came to, against the same by NumPy and against training's own sums."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from convnext_jax.training.scoring import jit_score_step, make_score_step, score
from convnext_jax.training.sharding import batch_sharding, create_mesh, to_global
from convnext_jax.training.step import make_eval_step

K, B = 12, 16


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(K)(images.reshape(images.shape[0], -1))


@pytest.fixture(scope="module")
def variables():
    return Linear().init(jax.random.key(1), jnp.zeros((1, 4, 4, 3)))


def host_batches(targets):
    """Three batches, the last with padding; `targets` makes (B, K) from labels."""
    rng = np.random.default_rng(0)
    for filled in (B, B, 5):
        label = rng.integers(0, K, B).astype(np.int32)
        yield {
            "image": rng.integers(0, 256, (B, 4, 4, 3), dtype=np.uint8),
            "label": label,
            "target": targets(label),
            "mask": (np.arange(B) < filled).astype(np.float32),
        }


def one_hot(label):
    return np.arange(K) == label[:, None]


def neighbours(label):
    """A set of right answers: the label and, but for 0, the class below it."""
    return one_hot(label) | one_hot(np.maximum(label - 1, 0))


def logits_of(variables, images):
    kernel, bias = (
        np.asarray(variables["params"]["Dense_0"][k], np.float64) for k in ("kernel", "bias")
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).reshape(len(images), -1) @ kernel + bias


@pytest.mark.parametrize("targets", [one_hot, neighbours])
@pytest.mark.parametrize("answers", [None, np.arange(K) % 3 > 0], ids=["all", "some"])
def test_scores_are_those_of_numpy(variables, targets, answers):
    allowed = np.ones(K, bool) if answers is None else answers
    wanted = {"label": [], "prediction": [], "rank": [], "loss": []}
    for batch in host_batches(targets):
        for row in np.flatnonzero(batch["mask"]):
            logits = logits_of(variables, batch["image"][row : row + 1])[0]
            right = batch["target"][row] & allowed
            chance = np.exp(logits) * allowed
            order = sorted(np.flatnonzero(allowed), key=lambda k: -logits[k])
            above = next((i for i, k in enumerate(order) if right[k]), len(order))
            wanted["label"].append(batch["label"][row])
            wanted["prediction"].append(order[0])
            wanted["rank"].append(above)
            with np.errstate(divide="ignore"):
                wanted["loss"].append(-np.log(chance[right].sum() / chance.sum()))

    mesh = create_mesh()
    step = jit_score_step(make_score_step(Linear(), answers=answers), mesh)
    on = batch_sharding(mesh)
    seen = []
    found = score(
        step,
        variables,
        (to_global(batch, on) for batch in host_batches(targets)),
        progress=lambda part: seen.append(len(part)),
    )
    assert seen == [B, B, 5]
    assert len(found) == 2 * B + 5
    for name in ("label", "prediction", "rank"):
        np.testing.assert_array_equal(getattr(found, name), wanted[name])
    np.testing.assert_allclose(found.loss, wanted["loss"], rtol=1e-4)
    assert 0 < found.top1.sum() < found.top5.sum() < len(found)


def test_sums_are_those_of_the_evaluation_in_training(variables):
    batches = [
        {name: jnp.asarray(x) for name, x in batch.items()} for batch in host_batches(one_hot)
    ]
    sums = [make_eval_step(Linear())(variables, batch) for batch in batches]
    found = score(make_score_step(Linear()), variables, batches)
    assert found.top1.sum() == sum(float(s["top1"]) for s in sums)
    assert found.top5.sum() == sum(float(s["top5"]) for s in sums)
    assert found.loss.sum() == pytest.approx(sum(float(s["loss"]) for s in sums), rel=1e-5)


def test_running_averages_are_used():
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = nn.BatchNorm(use_running_average=not train)(images)
            return nn.Dense(K)(x.reshape(x.shape[0], -1))

    model = Normalised()
    variables = model.init(jax.random.key(1), jnp.zeros((1, 4, 4, 3)))
    shifted = {
        **variables,
        "batch_stats": jax.tree.map(lambda x: x + 1.0, variables["batch_stats"]),
    }
    batches = list(host_batches(one_hot))
    for given in (variables, shifted):
        found = score(make_score_step(model), given, batches[:1])
        images = (batches[0]["image"] / 255 - IMAGENET_MEAN) / IMAGENET_STD
        logits = model.apply(given, jnp.asarray(images, jnp.float32))
        loss = -jax.nn.log_softmax(logits)[np.arange(B), batches[0]["label"]]
        np.testing.assert_allclose(found.loss, loss, rtol=1e-5)


def test_no_tie_and_no_nan_is_a_hit(variables):
    batch = {name: jnp.asarray(x) for name, x in next(host_batches(one_hot)).items()}
    for value in (0.0, jnp.nan):
        dead = jax.tree.map(lambda x, v=value: x * v, variables)
        found = score(make_score_step(Linear()), dead, [batch])
        assert found.rank.tolist() == [K - 1] * B
        assert (found.prediction != found.label).all()


def test_nothing_at_all(variables):
    assert len(score(make_score_step(Linear()), variables, [])) == 0
