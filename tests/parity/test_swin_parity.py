"""Swin against transformers', live: logits, feature maps and gradients.

With `-s` each case prints a line: its greatest relative errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.convert.detection import detect
from convnext_jax.convert.mapping import to_variables
from convnext_jax.models import SwinTransformer, create_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torchvision_operators import define_missing_operators  # noqa: E402  (it needs PyTorch)

define_missing_operators()
from transformers import SwinConfig, SwinForImageClassification  # noqa: E402

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def params_of(tensors):
    """transformers' parameters, or gradients by their names, as our tree."""
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
    params = to_variables(arrays, detect(arrays))["params"]
    return jax.tree.map(jnp.asarray, params)


def reference(model, size):
    """transformers' Swin with random weights that hide nothing: no bias and no table near 0."""
    torch.manual_seed(5)
    config = SwinConfig(
        image_size=size,
        patch_size=model.patch_size,
        embed_dim=model.width,
        depths=list(model.depths),
        num_heads=list(model.num_heads),
        window_size=model.window_size,
        num_labels=model.num_classes,
        drop_path_rate=0.0,
    )
    theirs = SwinForImageClassification(config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if name.endswith("bias_table"):
                tensor.normal_(0.0, 1.0)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, 1.5 / float(np.sqrt(tensor[0].numel())))
            else:
                is_scale = name.endswith("weight")
                tensor.normal_(1.0 if is_scale else 0.0, 0.3)
    return theirs


def error(ours, theirs):
    """The greatest difference relative to the greatest value, over one or more arrays."""
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in leaves)


SMALL = {"width": 32, "num_heads": (1, 2, 4, 8), "num_classes": 10}
CASES = {
    "tiny at 224": (create_model("swin_tiny", num_classes=10), (224, 224)),
    "window 12 at 384": (SwinTransformer(depths=(2, 2, 2, 2), window_size=12, **SMALL), (384, 384)),
    # Maps of 58 × 63, 29 × 32, 15 × 16 and 8 × 8 tokens: all of them are padded.
    "padded": (SwinTransformer(depths=(2, 2, 4, 2), **SMALL), (230, 251)),
    "an even window": (SwinTransformer(depths=(2, 2, 2, 2), window_size=4, **SMALL), (160, 200)),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
    model, (height, width) = CASES[case]
    theirs = reference(model, (height, width))
    params = params_of(dict(theirs.named_parameters()))
    x = np.random.default_rng(6).normal(size=(2, height, width, 3)).astype(np.float32)
    weight = np.random.default_rng(7).normal(size=(2, 10)).astype(np.float32)
    expected_shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected_shapes)

    @jax.jit
    def outputs(params):
        def loss(params):
            logits = model.apply({"params": params}, x)
            return (logits * weight).sum(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return logits, model.apply({"params": params}, x, method="feature_maps"), gradients

    our_logits, our_maps, our_gradients = outputs(params)

    maps = []
    for stage in theirs.swin.encoder.layers:
        stage.blocks[-1].register_forward_hook(lambda *a: maps.append(a[-1][0].detach().numpy()))
    logits = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).logits
    (logits * torch.from_numpy(weight)).sum().backward()
    gradients = params_of({k: p.grad for k, p in theirs.named_parameters()})
    maps = [m.reshape(ours.shape) for m, ours in zip(maps, our_maps, strict=True)]
    errors = {
        "logits": error(our_logits, logits.detach().numpy()),
        "maps": error(our_maps, tuple(maps)),
        "gradients": error(our_gradients, gradients),
    }
    print(f"\n{case}: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    assert errors["logits"] <= TOLERANCE
    assert errors["maps"] <= TOLERANCE
    assert errors["gradients"] <= GRADIENT_TOLERANCE
