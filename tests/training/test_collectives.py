"""What a compiled training step exchanges between devices: parameters, gradients, scalars.

No activations, and no images. Left to itself the partitioner sends both, as soon as parameters are
cut; see docs/collectives.md.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from convnext_jax.data.mixing import MixConfig
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import create_model
from convnext_jax.training import optim, sharding, step
from convnext_jax.training.gathering import gathered
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.state import abstract_state

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(-start)?\(.*?channel_id=(\d+)(.*)")
ARRAY = re.compile(r"\b([a-z]+)(\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a collective gives back on each device."""

    kind: str
    dtype: str
    bits: int
    shape: tuple[int, ...]
    source: str

    @property
    def bytes(self):
        return math.prod(self.shape) * self.bits // 8


def exchanged(text):
    """All that an optimised program exchanges, as far as no loop holds it.

    A TPU's asynchronous collective stands in each of the fusions that carry it on, under one
    channel.
    """
    found = {}
    for shape, kind, _, channel, rest in INSTRUCTION.findall(text):
        source = re.search(r'op_name="([^"]*)"', rest)
        found[channel] = [
            Array(
                kind,
                dtype + bits,
                int(bits),
                tuple(int(n) for n in dims.split(",") if n),
                source[1] if source else "",
            )
            for dtype, bits, dims in ARRAY.findall(shape)
        ]
    return [array for arrays in found.values() for array in arrays]


def compile_step(model, mesh, batch, size, *, with_mesh=True, **kwargs):
    """The abstract state, and the text of its training step, of `batch` images on a mesh."""
    schedule = warmup_cosine(1e-3, 1e-6, 10, 100)
    optimizer = optim.adamw(schedule, depths=model.depths, weight_decay=0.05)
    abstract = abstract_state(model, optimizer, (size, size, 3), mesh, ema=True)
    train_step = step.make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=model.num_classes,
        seed=0,
        ema_decay=0.99,
        mesh=mesh if with_mesh else None,
        **kwargs,
    )
    rows = sharding.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8, sharding=rows)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    program = step.jit_train_step(train_step, abstract, mesh)
    return abstract, program.lower(abstract, {"image": images, "label": labels}).compile().as_text()


def shapes_of_parameters(params):
    """Of whole and of cut parameters, and scalars; sorted, since the compiler may transpose.

    The kernels of patches are matrices on the CPU.
    """
    leaves = jax.tree.leaves(params)
    shapes = {leaf.shape for leaf in leaves}
    shapes |= {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}
    shapes |= {(math.prod(shape[:-1]), shape[-1]) for shape in shapes if len(shape) > 2}
    return {tuple(sorted(shape)) for shape in shapes} | {()}


def strangers(found, params):
    allowed = shapes_of_parameters(params)
    return [array for array in found if tuple(sorted(n for n in array.shape)) not in allowed]


def is_cut(leaf):
    return leaf.sharding.spec != P()


def small_model(**kwargs):
    # XLA's depthwise convolution, as on a TPU: what the CPU's is made of sums over other arrays.
    return ConvNeXt(
        num_classes=10,
        depths=(1, 1),
        dims=(16, 32),
        patch_size=2,
        depthwise="xla",
        layer_scale_init=1.0,
        drop_path_rate=0.1,
        **kwargs,
    )


@pytest.fixture(scope="module")
def small_kernels_cut():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 256)
        yield


@pytest.fixture(scope="module")
def compiled(small_kernels_cut):
    """Of steps on 8 devices, by the length of "fsdp", what is exchanged."""

    @functools.cache
    def compiled(fsdp, with_mesh=True):
        # 24 images of 12 × 12 pixels: no channels, classes or kernels are of these sizes.
        abstract, text = compile_step(
            small_model(),
            sharding.create_mesh(-1, fsdp),
            24,
            12,
            mix_config=MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
            with_mesh=with_mesh,
        )
        return abstract.params, exchanged(text)

    return compiled


@pytest.mark.parametrize("fsdp", [1, 4])
def test_nothing_but_parameters_and_scalars_is_exchanged(compiled, fsdp):
    params, found = compiled(fsdp)
    assert not strangers(found, params)
    assert {array.kind for array in found} <= {"all-reduce", "all-gather", "reduce-scatter"}


def test_whole_parameters_cost_one_all_reduce_of_the_gradients(compiled):
    params, found = compiled(1)
    assert {array.kind for array in found} == {"all-reduce"}
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    # And the loss; nothing else.
    assert sum(array.bytes for array in found) == gradients + 4


def test_cut_parameters_are_gathered_once_and_their_gradients_reduced_in_parts(compiled):
    params, found = compiled(4)
    cut = sum(leaf.size * 4 for leaf in jax.tree.leaves(params) if is_cut(leaf))
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    assert cut > 0.9 * total
    assert sum(array.bytes for array in found if array.kind == "all-gather") == cut
    # Over "fsdp" each gradient whole, then over "data" the part that a device keeps. Depthwise
    # kernels go over both at once. The slack is for scalars: the loss, and the gradient's norm.
    reduced = sum(array.bytes for array in found if array.kind != "all-gather")
    depthwise = 4 * 7 * 7 * (16 + 32)
    assert total + (cut - depthwise) // 4 <= reduced <= total + cut // 4 + 200


@pytest.mark.slow
def test_the_partitioner_by_itself_would_send_activations(compiled):
    """That the tests above can fail: the same step, when it isn't told how parameters are used."""
    params, found = compiled(4, with_mesh=False)
    shapes = {array.shape for array in strangers(found, params)}
    assert (24, 6, 6, 16) in shapes, "the first block's activations, of all devices"
    assert (24, 12, 12, 3) in shapes, "all images"


def test_evaluation_gathers_parameters_and_sums_counts(small_kernels_cut):
    model, mesh = small_model(), sharding.create_mesh(-1, 4)
    optimizer = optim.adamw(lambda step: 0.1, depths=model.depths, weight_decay=0.05)
    abstract = abstract_state(model, optimizer, (12, 12, 3), mesh, ema=False)
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((24, 12, 12, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((24,), jnp.int32, sharding=rows),
        "mask": jax.ShapeDtypeStruct((24,), jnp.float32, sharding=rows),
    }
    program = step.jit_eval_step(step.make_eval_step(model, mesh=mesh), abstract, mesh)
    found = exchanged(program.lower(abstract.variables, batch).compile().as_text())
    cut = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract.params) if is_cut(leaf))
    assert not strangers(found, abstract.params)
    assert sum(array.bytes for array in found if array.kind == "all-gather") == cut
    assert sum(array.bytes for array in found if array.kind != "all-gather") == 4 * 4


def test_gathering_changes_no_bit(small_kernels_cut):
    """Kernels are cast before they are sent only where the model would cast them anyway."""
    model = small_model(dtype=jnp.bfloat16, head_hidden=48)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 12, 12, 3)).astype(np.float32)
    # Far larger than initial ones, beside which rounding a head could go unseen.
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: model.init(jax.random.key(0), images)["params"]),
    )

    def logits(fsdp):
        mesh = sharding.create_mesh(-1, fsdp)
        rows, layout = sharding.batch_sharding(mesh), sharding.state_sharding(params, mesh)
        cut = jax.device_put(params, layout)
        assert fsdp == 1 or is_cut(cut["head"]["kernel"])
        program = jax.jit(
            lambda params, images: model.apply(
                {"params": gathered(params, mesh, model.dtype)}, images
            ),
            in_shardings=(layout, rows),
            out_shardings=rows,
        )
        return program(cut, jax.device_put(images, rows))

    np.testing.assert_array_equal(logits(4), logits(1))


@pytest.mark.tpu_compiler
def test_a_tpu_exchanges_parameters_alone_and_computes_meanwhile():
    """A shallow convnext_tiny at 224 pixels, compiled for 16 chips of TPU v5e."""
    pytest.importorskip("libtpu")
    from convnext_jax.analysis.tpu import tpu_topology

    model = create_model(
        "convnext_tiny", depths=(1, 1, 2, 1), dtype=jnp.bfloat16, drop_path_rate=0.1
    )
    mesh = sharding.create_mesh(4, 4, tpu_topology("v5e:4x4").devices)
    abstract, text = compile_step(model, mesh, 256, 224, mix_config=MixConfig(group_size=16))
    found = exchanged(text)
    assert not strangers(found, abstract.params)

    # Kernels are gathered in the compute type; the head's is float32.
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract.params)
    cut = {optim.path_name(path): leaf.size for path, leaf in leaves if is_cut(leaf)}
    sent = [array for array in found if array.kind == "all-gather"]
    assert {array.dtype for array in sent} == {"bf16", "f32"}
    expected = 2 * sum(cut.values()) + 2 * cut["head/kernel"]
    assert sum(array.bytes for array in sent) == expected

    # Most of these bytes are on their way while a convolution or a product is computed.
    hidden = exchanged("\n".join(re.findall(r".* all-gather\(.*chain_id=.*", text)))
    assert sum(array.bytes for array in hidden) > 0.9 * expected

    # A TPU's reduce-scatter is an all-reduce that is fused with the slice of it that is kept.
    assert text.count("\n%all-reduce-scatter") > 5
