import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from convnext_jax.errors import UserError
from convnext_jax.models.registry import create_model
from convnext_jax.training import optim, sharding
from convnext_jax.training.state import abstract_state


def test_mesh_takes_all_devices():
    mesh = sharding.create_mesh(-1, 2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (0, 1), (1, 0), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(UserError, match=r"config\.mesh"):
        sharding.create_mesh(data, fsdp)


# One of each kind; the names of the leaves are the same in every size.
@pytest.mark.parametrize(
    "name", ["convnext_tiny", "convnext_large_mlp", "convnext_iso_large", "convnextv2_atto"]
)
def test_every_leaf_of_every_model_matches_a_rule(name):
    model = create_model(name, feature_norms=True)
    optimizer = optim.adamw(lambda s: 0.1, depths=model.depths, weight_decay=0.1)
    mesh = sharding.create_mesh(2, 4)
    # Raises where a leaf matches none.
    abstract = abstract_state(model, optimizer, (64, 64, 3), mesh, ema=True)
    cut = sum(leaf.size for leaf in jax.tree.leaves(abstract) if leaf.sharding.spec != P())
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    # What is left whole are vectors and the small models' first kernels.
    assert cut > 0.9 * total, f"{cut / total:.1%} of the state is cut"


def test_an_unknown_leaf_is_named():
    mesh = sharding.create_mesh()
    with pytest.raises(ValueError, match="no partition rule matches mystery/weight"):
        sharding.state_sharding({"mystery": {"weight": jnp.zeros(3)}}, mesh)


def test_small_and_indivisible_leaves_stay_whole():
    mesh = sharding.create_mesh(2, 4)
    shapes = {
        "large/pwconv1": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)},
        "small/pwconv1": {"kernel": jax.ShapeDtypeStruct((8, 32), jnp.float32)},
        "odd/pwconv1": {"kernel": jax.ShapeDtypeStruct((256, 254), jnp.float32)},
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.state_sharding(shapes, mesh))
    assert specs["large/pwconv1"]["kernel"] == P(None, "fsdp")
    assert specs["small/pwconv1"]["kernel"] == P()
    assert specs["odd/pwconv1"]["kernel"] == P()


def test_batches_keep_their_order_and_rows():
    mesh = sharding.create_mesh()
    batches = [{"x": np.arange(16) + 100 * i} for i in range(5)]
    got = list(
        sharding.prefetch_to_device(iter(batches), sharding.batch_sharding(mesh), ["x"], size=2)
    )
    assert len(got) == 5
    for expected, batch in zip(batches, got, strict=True):
        np.testing.assert_array_equal(batch["x"], expected["x"])
        assert batch["x"].addressable_shards[3].data.shape == (2,)


def test_prefetching_stays_within_its_bound():
    drawn = []

    def batches():
        for i in range(10):
            drawn.append(i)
            yield {"x": np.full(8, i)}

    mesh = sharding.create_mesh()
    iterator = sharding.prefetch_to_device(batches(), sharding.batch_sharding(mesh), ["x"], size=2)
    next(iterator)
    assert drawn == [0, 1, 2]
