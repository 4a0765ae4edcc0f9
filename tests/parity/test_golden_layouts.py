"""Every layout against recorded outputs of PyTorch, without PyTorch; and that slips would show."""

import contextlib
import functools

import golden_layouts
import jax
import numpy as np
import pytest
from compiled_parts import compile_parts
from flax import linen as nn
from flax import traverse_util

from convnext_jax.convert.detection import detect
from convnext_jax.convert.mapping import to_variables
from convnext_jax.models import ConvNeXt, blocks
from convnext_jax.models.layers import GlobalResponseNorm

TOLERANCE = 1e-5


@functools.cache
def converted(label):
    tensors = golden_layouts.recorded()[label].tensors
    detected = detect(tensors)
    return detected, to_variables(tensors, detected)["params"]


def largest_error(label, params, compiled=True, **overrides):
    """Greatest relative error among logits and feature maps."""
    detected, _ = converted(label)
    model = ConvNeXt(**{**detected.arguments, "depthwise": "xla", **overrides})
    expected = golden_layouts.recorded()[label].outputs
    with nn.intercept_methods(compile_parts) if compiled else contextlib.nullcontext():
        image = golden_layouts.image()
        maps = model.apply({"params": params}, image, method="feature_maps")
        actual = {f"stage_{i}": features for i, features in enumerate(maps)}
        if "logits" in expected:
            actual["logits"] = model.apply({"params": params}, image)
    assert actual.keys() == expected.keys()
    return max(
        float(np.abs(actual[k] - expected[k]).max() / np.abs(expected[k]).max()) for k in expected
    )


@pytest.mark.parametrize("label", golden_layouts.recorded())
def test_outputs_are_those_of_pytorch(label):
    detected, params = converted(label)
    assert detected.layout.name == label.split(",")[0]
    assert largest_error(label, params) <= TOLERANCE


class TestSlipsShow:
    """The comparison is worth what it would catch: each of these errs by more than ten times."""

    V1, V2 = "timm conv_mlp", "transformers V2"

    @pytest.mark.parametrize(("label", "epsilon"), [(V1, 1e-5), (V2, 1e-12)])
    def test_epsilon_of_the_norms(self, label, epsilon):
        _, params = converted(label)
        assert largest_error(label, params, norm_eps=epsilon) > 10 * TOLERANCE

    def test_epsilon_of_grn(self, monkeypatch):
        wrong = functools.partial(GlobalResponseNorm, epsilon=1e-5)
        monkeypatch.setattr(blocks, "GlobalResponseNorm", wrong)
        assert largest_error(self.V2, converted(self.V2)[1], compiled=False) > 10 * TOLERANCE

    def test_approximate_gelu(self, monkeypatch):
        monkeypatch.setattr(blocks, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
        assert largest_error(self.V1, converted(self.V1)[1], compiled=False) > 10 * TOLERANCE

    @pytest.mark.parametrize("label", [V1, V2])
    def test_any_one_parameter(self, label):
        flat = traverse_util.flatten_dict(converted(label)[1])
        for path, value in flat.items():
            for spoilt in _spoilt(path, value):
                slip = traverse_util.unflatten_dict({**flat, path: spoilt})
                assert largest_error(label, slip) > 10 * TOLERANCE, path


def _spoilt(path, value):
    """A bias left out; a scale left at 1; a kernel's channels reversed, or its axes swapped."""
    if path[-1] in ("bias", "beta"):
        return [np.zeros_like(value)]
    if path[-1] in ("scale", "gamma"):
        return [np.ones_like(value)]
    # On the last stage's map of one pixel a depthwise kernel has but one effective tap.
    swappable = value.ndim == 4 and path[0] != "stages_3"
    return [value[..., ::-1], *([value.swapaxes(0, 1)] if swappable else [])]
