import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval
from jaxprs import CHECKPOINTS, equations
from small_models import abstract_variables, jit, photos

from convnext_jax.analysis.traced_counts import traced_counts
from convnext_jax.models import ConvNeXt, ModernizedResNet, create_model, list_models
from convnext_jax.models.roadmap_steps import ROADS, STEPS, Step, choices_after

NAMES = [step.name for step in STEPS]
PARAMETERS = {
    "00_resnet": 25_557_032,
    "01_modern_recipe": 25_557_032,
    "02_stage_ratio": 28_628_520,
    "03_patchify_stem": 28_622_120,
    "04_depthwise_conv": 15_722_600,
    "05_width": 33_760_936,
    "06_inverted_bottleneck": 25_851_400,
    "07_dw_first": 25_625_416,
    # Kernels of other sizes differ by 5,952 weights a position: the sum of all blocks' widths, that
    # of a block which opens a stage being the stage before's.
    "08_kernel_5": 25_863_496 - (49 - 25) * 5_952,
    "09_kernel_7": 25_863_496,
    "10_kernel_9": 25_863_496 + (81 - 49) * 5_952,
    "11_kernel_11": 25_863_496 + (121 - 49) * 5_952,
    "12_gelu": 25_863_496,
    "13_fewer_activations": 25_863_496,
    "14_fewer_norms": 25_797_256,
    "15_layer_norm": 25_836_328,
    "16_convnext": 28_589_128,
}
# Where the paper's GFLOPs are not those of its network: what is counted instead.
COUNTED = {("t", "15_layer_norm"): "4.15", ("t", "16_convnext"): "4.46"}
# Left to the slow tests: on the road "t" what has the counts of another step, by its choices; on
# the road "b", which differs in depths and width alone, all but one.
QUICK = {
    "t": [name for name in PARAMETERS if not name.startswith(("01", "12", "13"))],
    "b": ["02_stage_ratio"],
}


def case(road, step):
    marks = () if step.name in QUICK[road] else pytest.mark.slow
    return pytest.param(road, step, id=f"{road}/{step.name}", marks=marks)


@pytest.mark.parametrize(("road", "step"), [case(road, step) for road in ROADS for step in STEPS])
def test_counts_are_the_papers(road: str, step: Step):
    counts = traced_counts(create_model(f"roadmap_{road}/{step.name}"), 224)
    published = getattr(step, road).gflops
    expected = COUNTED.get((road, step.name), f"{published:.2f}")
    assert f"{counts.macs / 1e9:.2f}" == expected
    if road == "t":
        assert counts.parameters == PARAMETERS[step.name]


def test_names():
    for road, first, last in (("t", "resnet50", "tiny"), ("b", "resnet200", "base")):
        assert list_models(f"roadmap_{road}/*") == [f"roadmap_{road}/{name}" for name in NAMES]
        for name in NAMES[:2]:
            assert create_model(f"roadmap_{road}/{name}") == create_model(first)
        model = create_model(f"roadmap_{road}/{NAMES[-1]}")
        assert isinstance(model, ConvNeXt)
        assert model == create_model(f"convnext_{last}")
    assert create_model("roadmap_t/07_dw_first", width=8).width == 8
    with pytest.raises(TypeError, match="ModernizedResNet has no argument dims; it has num_clas"):
        create_model("resnet50", dims=(8,))
    with pytest.raises(ValueError, match=r"no step is called '07'; there are 00_resnet, .*"):
        choices_after("t", "07")


def small(name, **overrides):
    return ModernizedResNet(
        **{
            **choices_after("t", name),
            "num_classes": 5,
            "depths": (1, 2),
            "width": 8,
            "depthwise": "xla",
            **overrides,
        }
    )


def training_program(model, images):
    """The traced training call, and which of its inputs and outputs are whose."""
    variables = abstract_variables(model, images)
    rngs = {"dropout": jax.random.key(0)}
    program, shapes = jax.make_jaxpr(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"], rngs=rngs),
        return_shape=True,
    )(variables, images)
    return program, variables, shapes


def test_with_all_choices_made_it_is_convnext():
    """`create_model` builds ConvNeXt there; this module gets to the very same program."""
    choices = {"num_classes": 5, "drop_path_rate": 0.3, "head_init_scale": 0.1}
    road = small("16_convnext", **choices)
    convnext = ConvNeXt(depths=(1, 2), dims=(8, 16), depthwise="xla", **choices)

    def program(model, train):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return jax.make_jaxpr(
            lambda images: model.init_with_output(rngs, images, train=train), return_shape=True
        )(photos(40, 37))

    for dtype, train in ((jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, True)):
        ours, our_shapes = program(road.clone(dtype=dtype), train)
        theirs, their_shapes = program(convnext.clone(dtype=dtype), train)
        assert our_shapes == their_shapes
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_trains_all_that_it_has(name):
    images = photos(32)
    program, variables, (logits, updated) = training_program(small(name), images)
    assert logits.shape == (2, 5)
    assert jax.tree.map(jnp.shape, updated.get("batch_stats", {})) == jax.tree.map(
        jnp.shape, variables.get("batch_stats", {})
    )
    assert ("batch_stats" in variables) == (NAMES.index(name) < 15)

    outputs = program.jaxpr.outvars
    inputs = dict(
        zip(
            [path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]],
            program.jaxpr.invars,
            strict=False,
        )
    )
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] + [False] * (len(outputs) - 1))
    unused = [path for path, is_used in zip(inputs, used, strict=False) if not is_used]
    # The logits are those of the batch's own statistics; the running mean is where sums start.
    assert {path[-1].key for path in unused} <= {"var"}
    assert not set(map(id, outputs)) & set(map(id, inputs.values()))


def test_stochastic_depth_and_remat():
    images = photos(32)
    model = small("14_fewer_norms", drop_path_rate=0.5, depths=(2, 1))

    def primitives(model):
        program, *_ = training_program(model, images)
        return [eqn.primitive.name for eqn in equations(program)]

    # The first block's rate is 0.
    assert primitives(model).count("random_bits") == 2
    assert primitives(small("14_fewer_norms")).count("random_bits") == 0
    assert sum(name in CHECKPOINTS for name in primitives(model.clone(remat=True))) == 3


@pytest.mark.parametrize("name", ["00_resnet", "12_gelu", "15_layer_norm"])
def test_bfloat16(name):
    model, images = small(name, dtype=jnp.bfloat16), photos(32)
    variables = abstract_variables(model, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    program = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    products = [
        eqn
        for eqn in equations(program)
        if eqn.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    types = [{var.aval.dtype for var in eqn.invars + eqn.outvars} for eqn in products]
    heads = [found for found in types if jnp.dtype(jnp.float32) in found]
    assert heads == [{jnp.dtype(jnp.float32)}]
    assert {jnp.dtype(jnp.bfloat16)} in types
    convs = [eqn for eqn in products if eqn.primitive.name == "conv_general_dilated"]
    assert all(eqn.params["precision"] is None for eqn in convs)
    (head,) = (eqn for eqn in products if eqn.invars[0].aval.dtype == jnp.float32)
    assert head.params["precision"][0] == jax.lax.Precision.HIGHEST
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="feature_maps"), variables, images)
    assert {leaf.dtype for leaf in maps} == {jnp.dtype(jnp.bfloat16)}


def test_feature_maps():
    images = photos(37, 50)
    for name, sides in (("00_resnet", [(10, 13), (5, 7)]), ("15_layer_norm", [(9, 12), (5, 6)])):
        model = small(name)
        variables = abstract_variables(model, images)

        def maps(variables, images, model=model, **arguments):
            return model.apply(variables, images, method="feature_maps", **arguments)

        shapes = [leaf.shape for leaf in jax.eval_shape(maps, variables, images)]
        assert shapes == [(2, *side, dim) for side, dim in zip(sides, model.dims, strict=True)]
        with pytest.raises(ValueError, match=r"indices must be one or more of 0\.\.1"):
            maps(variables, images, indices=(2,))
        headless = model.clone(num_classes=0)
        pooled = jax.eval_shape(headless.apply, variables, images)
        assert pooled.shape == (2, model.dims[-1])


def test_zero_init_residual():
    images = photos(32)
    model = small("00_resnet", zero_init_residual=True)

    def scales(key):
        block = model.init(key, images)["params"]["stages_0"]["blocks_0"]
        return [block[norm]["scale"] for norm in ("norm1", "norm2", "norm3")]

    assert [float(jnp.ptp(scale)) for scale in jit(scales)(jax.random.key(0))] == [0, 0, 0]
    assert [float(scale[0]) for scale in jit(scales)(jax.random.key(0))] == [1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (3, 0)}, r"depths and width must be positive, but are \(3, 0\) and 64"),
        ({"spatial_conv": "grouped"}, r"spatial_conv must be one of \('dense', 'depthwise'\)"),
        ({"num_norms": 2}, r"num_norms must be one of \(3, 1\), but is 2"),
        ({"kernel_size": 4}, "kernel_size must be odd, but is 4"),
        ({"zero_init_residual": True, "num_norms": 1}, 'takes norm_type="batch" and num_norms=3'),
        ({"bn_groups": 0}, "bn_groups must be 1 or more, but is 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), but is 1.0"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModernizedResNet(**arguments)


def test_images_that_it_cannot_take():
    model = small("00_resnet")
    for images, message in (
        (jnp.zeros((32, 32, 3)), r"takes images \(batch, .*got shape \(32, 32, 3\)"),
        (jnp.zeros((1, 32, 32, 3), jnp.uint8), "floating-point images, but got uint8"),
        (jnp.zeros((1, 7, 32, 3)), "7×32 pixels are too small .* stride of 8 needs at least 8"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), images)
