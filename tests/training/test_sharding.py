import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from convnext_jax.errors import UserError
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model, list_models
from convnext_jax.training import optim, sharding
from convnext_jax.training.state import abstract_state, create_state

# Each kernel by the words that end its path, and the dimension that is cut: here once more, and in
# other terms than the rules.
CUT_DIMENSION = {
    "stem/conv/kernel": 3,
    "downsample/conv/kernel": 3,
    "shortcut/conv/kernel": 3,
    "blocks_0/conv/kernel": 3,
    "dwconv/kernel": 3,
    "pwconv1/kernel": 1,
    "pwconv2/kernel": 0,
    "qkv/kernel": 1,
    "proj/kernel": 0,
    "fc1/kernel": 1,
    "fc2/kernel": 0,
    "reduction/kernel": 0,
    "pre_logits/kernel": 0,
    "head/kernel": 0,
}
# A few columns wide, whatever the model's size.
NEVER_CUT = ("relative_position_bias_table",)


def expected_spec(name, shape, fsdp):
    """How a leaf must be laid out."""
    dimension = next((d for end, d in CUT_DIMENSION.items() if name.endswith(end)), None)
    known = dimension is not None or len(shape) <= 1 or name.endswith(NEVER_CUT)
    assert known, f"{name} is no vector and in no table"
    if dimension is None or np.prod(shape) < 2**14 or shape[dimension] % fsdp:
        return P()
    return P(*["fsdp" if d == dimension else None for d in range(len(shape))])


def named_leaves(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(optim.path_name(path), leaf) for path, leaf in leaves]


def parameter_shapes(name):
    """Of a model with all that it can have, one block standing for all of a stage."""
    model = create_model(name, **({"feature_norms": True} if name.startswith("convnext") else {}))
    model = model.clone(depths=(1,) * len(model.depths))
    images = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lambda key: model.init(key, images), jax.random.key(0))


def test_mesh_takes_all_devices():
    mesh = sharding.create_mesh(-1, 2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (0, 1), (1, 0), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(UserError, match=r"config\.mesh"):
        sharding.create_mesh(data, fsdp)


OTHERS = ("resnet50", "roadmap_t/04_depthwise_conv", "roadmap_b/09_kernel_7", "swin_large_window12")


@pytest.mark.parametrize("name", [*list_models("convnext*"), *OTHERS])
def test_every_kernel_of_every_model_is_cut(name):
    shapes = parameter_shapes(name)
    for fsdp in (1, 2, 4, 8):
        layout = dict(named_leaves(sharding.state_sharding(shapes, sharding.create_mesh(-1, fsdp))))
        for leaf_name, leaf in named_leaves(shapes):
            spec = expected_spec(leaf_name, leaf.shape, fsdp)
            assert layout[leaf_name].spec == spec, f"{leaf_name} {leaf.shape} on {fsdp}"
            # Nothing but vectors and small kernels is left whole.
            large = leaf.size >= 2**14 and not leaf_name.endswith(NEVER_CUT)
            assert (spec != P()) == large, f"{leaf_name} {leaf.shape} on {fsdp}"


@pytest.fixture(scope="module")
def states():
    """A small but real training state on 8 devices, by the length of "fsdp"."""
    model = ConvNeXt(num_classes=10, depths=(1, 1), dims=(64, 128), patch_size=2)
    optimizer = optim.adamw(lambda step: 0.1, depths=model.depths, weight_decay=0.1)

    arguments = (model, optimizer, (8, 8, 3))

    def moved(state, fsdp):
        abstract = abstract_state(*arguments, sharding.create_mesh(-1, fsdp), ema=True)
        return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    # Each creation is compiled; two, without a cut and with the finest, do for all.
    one, eight = (
        create_state(*arguments, sharding.create_mesh(-1, fsdp), seed=0, ema=True)
        for fsdp in (1, 8)
    )
    return {1: one, 2: moved(one, 2), 4: moved(one, 4), 8: eight}


def test_each_leaf_of_a_state_lies_where_the_rule_says(states):
    for fsdp, state in states.items():
        kinds = dict.fromkeys(("params", "mu", "nu", "ema_params"), 0)
        for name, leaf in named_leaves(state):
            spec = expected_spec(name, leaf.shape, fsdp)
            parts = fsdp if spec != P() else 1
            assert leaf.sharding.spec == spec, f"{name} {leaf.shape} on {fsdp}"
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}
            for kind in kinds:
                kinds[kind] += kind in name.split("/") and spec != P()
        # Four kernels of the two blocks and the downsampling, in each of the four trees.
        assert kinds == dict.fromkeys(kinds, 5)


def test_the_memory_of_each_device_falls_with_fsdp(states):
    cut = 2 * 64 * 256 + 2 * 128 * 512 + 2 * 2 * 64 * 128  # pointwise, downsampling
    small_kernels = 2 * 2 * 3 * 64 + 7 * 7 * (64 + 128) + 128 * 10  # stem, depthwise, head
    vectors = sum(c + 2 * c + 4 * c + c + c for c in (64, 128))  # blocks, in their order
    vectors += (64 + 2 * 64) + (2 * 64 + 128) + (2 * 128 + 10)  # stem, downsampling, norm and head
    for fsdp, state in states.items():
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(state):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        # Parameters, two moments and the average; then step, skipped, and the counts of Adam and of
        # the schedule, 4 bytes each.
        expected = 4 * 4 * (cut // fsdp + vectors + small_kernels) + 4 * 4
        assert set(held.values()) == {expected}


def test_equal_seeds_give_equal_states_on_any_mesh(states):
    jax.tree.map(np.testing.assert_array_equal, states[8], states[1])


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
