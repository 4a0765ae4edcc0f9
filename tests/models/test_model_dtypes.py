"""What type each operation of the traced program has."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jaxprs import equations, jaxprs_within
from small_models import (
    DEPTHS,
    DIMS,
    abstract_variables,
    photos,
    random_variables,
    run,
)
from small_models import small as any_small

IMAGES = jnp.ones((2, 32, 64, 3))
MAP_SHAPES = [(2, 32 // s, 64 // s, d) for s, d in zip((4, 8, 16, 32), DIMS, strict=True)]


def small(**overrides):
    """The program as an accelerator gets it; the CPU has its own depthwise convolution."""
    return any_small(**{"depthwise": "xla", **overrides})


BFLOAT16 = jnp.dtype(jnp.bfloat16)
PRODUCTS = ("conv_general_dilated", "dot_general")


def traced(model, gradient=False):
    variables = abstract_variables(model, IMAGES)

    def loss(variables, images):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(variables, images, train=True, rngs=rngs).sum()

    return jax.make_jaxpr(jax.grad(loss) if gradient else loss)(variables, IMAGES)


def residual_adds(program):
    """Additions of two whole feature maps; a bias, being broadcast, has another shape."""
    for jaxpr in jaxprs_within(program.jaxpr):
        broadcast = {
            id(var)
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "broadcast_in_dim"
            for var in eqn.outvars
        }
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "add" and all(
                var.aval.shape in MAP_SHAPES and id(var) not in broadcast for var in eqn.invars
            ):
                yield eqn


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_bfloat16_residual_stream(version, remat):
    blocks = {"use_grn": True, "layer_scale_init": None} if version == 2 else {}
    program = traced(small(drop_path_rate=0.3, dtype=jnp.bfloat16, remat=remat, **blocks))
    adds = list(residual_adds(program))
    assert len(adds) == sum(DEPTHS)
    assert {var.aval.dtype for eqn in adds for var in eqn.invars + eqn.outvars} == {BFLOAT16}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_bfloat16_products_except_the_head(version, gradient):
    blocks = {"use_grn": True, "layer_scale_init": None} if version == 2 else {}
    program = traced(small(drop_path_rate=0.3, dtype=jnp.bfloat16, **blocks), gradient)
    products = [eqn for eqn in equations(program) if eqn.primitive.name in PRODUCTS]
    in_float32 = [
        eqn
        for eqn in products
        if any(var.aval.dtype != BFLOAT16 for var in eqn.invars + eqn.outvars)
    ]
    # One for the head, and two more in the backward pass: its weights' and its inputs' gradient.
    assert len(in_float32) == (3 if gradient else 1)
    for eqn in in_float32:
        assert all(var.aval.ndim == 2 for var in eqn.invars)
    assert len(products) > 3 * sum(DEPTHS)


def test_the_test_sees_a_promoted_stream():
    program = traced(small(drop_path_rate=0.3, dtype=jnp.float32))
    assert {eqn.outvars[0].aval.dtype for eqn in residual_adds(program)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, "bfloat16", jnp.float32])
def test_parameters_and_outputs(dtype):
    model = small(dtype=dtype, feature_norms=True)
    variables = abstract_variables(model, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    for method, expected in (
        ("__call__", jnp.float32),
        ("pooled_features", jnp.float32),
        ("feature_maps", dtype),
    ):
        outputs = jax.eval_shape(
            lambda v, x, method=method: model.apply(v, x, method=method), variables, IMAGES
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(expected)}


def test_bfloat16_images_and_bfloat16_parameters():
    model = small(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    images = IMAGES.astype(jnp.bfloat16)
    variables = abstract_variables(model, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {BFLOAT16}
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32


def test_bfloat16_follows_float32():
    exact = small(use_grn=True)
    variables = random_variables(exact, photos())
    logits = run(exact, variables, photos())
    rough = run(exact.clone(dtype=jnp.bfloat16), variables, photos())
    scale = float(jnp.abs(logits).max())
    chex.assert_trees_all_close(rough, logits, atol=0.05 * scale)
    assert float(jnp.abs(rough - logits).max()) > 0


@pytest.mark.parametrize(
    ("dtype", "given", "trunk", "head"),
    [
        (jnp.float32, None, jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST),
        (jnp.bfloat16, None, None, jax.lax.Precision.HIGHEST),
        (jnp.float32, "default", jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT),
    ],
)
def test_precision(dtype, given, trunk, head):
    program = traced(small(drop_path_rate=0.3, dtype=dtype, precision=given))

    def precision(eqn):
        given = eqn.params["precision"]
        return given[0] if isinstance(given, tuple) else given

    products = [eqn for eqn in equations(program) if eqn.primitive.name in PRODUCTS]
    is_head = [eqn.invars[0].aval.ndim == 2 for eqn in products]
    assert is_head.count(True) == 1
    for eqn, head_itself in zip(products, is_head, strict=True):
        assert precision(eqn) == (head if head_itself else trunk)
