import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from convnext_jax.analysis.macs import count_macs, count_parameters
from convnext_jax.analysis.traced_counts import Counts, traced_counts
from convnext_jax.models import create_model, list_models


def case(name):
    quick = name in (
        "convnext_tiny_hnf",
        "convnext_large_mlp",
        "convnext_iso_base",
        "convnextv2_atto",
    )
    return pytest.param(name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in list_models("convnext*")])
def test_convnexts_by_their_formula(name):
    model = create_model(name)
    # The formula is linear in the depths, so shallow models tell as much.
    model = model.clone(depths=(2, 1, 1, 1)[: len(model.depths)])
    assert traced_counts(model, (65, 96)).macs == count_macs(model, (65, 96))


def test_written_out_convolutions_and_checkpointed_blocks_count_alike():
    model = create_model("convnext_atto", depths=(1, 1, 1, 1))
    expected = traced_counts(model, 32)
    assert expected.parameters == count_parameters(model)
    assert traced_counts(model.clone(depthwise="shifts", remat=True), 32) == expected
    assert traced_counts(model, 32, in_channels=4).macs - expected.macs == 8 * 8 * 16 * 40


class Looping(nn.Module):
    """A 2×2 matrix applied to each pixel by one or another construct."""

    how: str

    @nn.compact
    def __call__(self, images, train=False):
        x = images.mean(axis=(1, 2))[:, :2]
        square = jnp.ones((2, 2))

        def product(x):
            return x @ square

        if self.how == "scan":
            return jax.lax.scan(lambda x, _: (product(x), None), x, length=5)[0]
        if self.how == "cond":
            return jax.lax.cond(x.sum() > 0, lambda x: product(product(x)), product, x)
        if self.how == "while":
            return jax.lax.while_loop(lambda x: x.sum() < 9, product, x)
        return jax.vmap(product)(jnp.stack([x, x, x]))


def test_loops_branches_and_batches():
    assert traced_counts(Looping("scan"), 4) == Counts(0, 5 * 4)
    assert traced_counts(Looping("cond"), 4).macs == 2 * 4
    assert traced_counts(Looping("vmap"), 4).macs == 3 * 4
    with pytest.raises(ValueError, match="while loop can't be counted"):
        traced_counts(Looping("while"), 4)
