"""The module in a program that knows nothing else of this project."""

import ast
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import convnext_jax.models
from convnext_jax.models import ConvNeXt

TINY = {"num_classes": 2, "depths": (2,), "dims": (8,), "patch_size": 2}


def stripes(seed, count):
    """Noisy images with horizontal stripes (label 0) or vertical ones (label 1)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    wave = np.broadcast_to(np.sin(2 * np.arange(12))[:, None], (12, 12))
    images = np.stack([wave.T if label else wave for label in labels])[..., None]
    noise = rng.normal(scale=0.3, size=images.shape)
    return jnp.asarray(images + noise, jnp.float32), jnp.asarray(labels, jnp.int32)


@jax.numpy_dtype_promotion("standard")  # as such a program has it, and optax needs it
def test_trains_with_jax_flax_and_optax_alone():
    model = ConvNeXt(**TINY, drop_path_rate=0.1)
    images, labels = stripes(0, 64)
    params = model.init(jax.random.key(1), images)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-3))

    @jax.jit
    def step(state, key):
        def loss(params):
            logits = state.apply_fn({"params": params}, images, train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for i in range(30):
        state, loss = step(state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[0] > 0.6
    assert losses[-1] < 0.3 * losses[0]

    unseen, truth = stripes(9, 32)
    predicted = model.apply({"params": state.params}, unseen).argmax(-1)
    assert float((predicted == truth).mean()) > 0.9


def test_wrapped_for_nnx():
    linen = ConvNeXt(**TINY, drop_path_rate=0.5)
    images, _ = stripes(0, 8)
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(params=0, dropout=1))
    nnx.bridge.lazy_init(model, images)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal_shapes(
        params, jax.eval_shape(linen.init, jax.random.key(0), images)["params"]
    )
    logits = model(images)
    chex.assert_shape(logits, (8, 2))
    chex.assert_trees_all_close(logits, linen.apply({"params": params}, images), atol=1e-6)

    gradients = nnx.grad(lambda model: (model(images, train=True) ** 2).mean())(model)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients))


def test_models_import_nothing_else_of_the_project():
    allowed = {"jax", "flax", "numpy", *sys.stdlib_module_names}
    folder = pathlib.Path(convnext_jax.models.__file__).parent
    files = sorted(folder.glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                inside = module.startswith("convnext_jax.models")
                assert inside or module.split(".")[0] in allowed, f"{file.name} imports {module}"
