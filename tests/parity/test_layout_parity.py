"""Every layout against PyTorch, live: a state dict is detected, mapped and run.

Logits and feature maps at 224 × 224 and at 225 × 193, and the gradient of every parameter at
224 × 224, for one image. With `-s` each case prints a line: its greatest relative errors.
"""

import functools

import jax
import numpy as np
import pytest
from compiled_parts import compile_parts
from flax import linen as nn
from flax import traverse_util

from convnext_jax.convert.detection import detect
from convnext_jax.convert.mapping import to_variables
from convnext_jax.models import ConvNeXt
from convnext_jax.models.blocks import Stage

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch_models as reference  # noqa: E402  (it needs PyTorch)

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

# Depths and first width. The larger ones are at full width and reduced depth.
SIZES = {
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((1, 1, 2, 1), 192),
    "xlarge": ((1, 1, 2, 1), 256),
    "huge": ((1, 1, 1, 1), 352),
    "xxlarge": ((1, 1, 1, 1), 384),
}
# For layouts whose size another case has at full depth.
SHALLOW = (1, 2, 1, 1)


def case(make, *size, depths=None, **arguments):
    """A reference of a size; `make` takes what is before the size, then depths and dims."""
    *before, size = size
    published, width = SIZES[size]
    dims = tuple(width * 2**i for i in range(4))
    return functools.partial(make, *before, depths or published, dims, **arguments)


def timm_case(name, **arguments):
    return functools.partial(reference.timm_model, name, **arguments)


V1, V2 = 1, 2
# (variant, layout to be detected) → what makes the reference.
CASES = {
    ("convnext_tiny", "transformers"): case(reference.transformers_model, V1, "tiny"),
    ("convnext_small", "transformers"): case(reference.transformers_model, V1, "small"),
    ("convnext_base", "transformers"): case(reference.transformers_model, V1, "base"),
    ("convnext_large", "transformers"): case(reference.transformers_model, V1, "large"),
    ("convnext_xlarge", "transformers"): case(reference.transformers_model, V1, "xlarge"),
    ("convnextv2_atto", "transformers V2"): case(reference.transformers_model, V2, "atto"),
    ("convnextv2_femto", "transformers V2"): case(reference.transformers_model, V2, "femto"),
    ("convnextv2_pico", "transformers V2"): case(reference.transformers_model, V2, "pico"),
    ("convnextv2_nano", "transformers V2"): case(reference.transformers_model, V2, "nano"),
    ("convnextv2_tiny", "transformers V2"): case(reference.transformers_model, V2, "tiny"),
    ("convnextv2_base", "transformers V2"): case(reference.transformers_model, V2, "base"),
    ("convnextv2_large", "transformers V2"): case(reference.transformers_model, V2, "large"),
    ("convnextv2_huge", "transformers V2"): case(reference.transformers_model, V2, "huge"),
    ("convnext_tiny, no head", "transformers without head"): case(
        reference.transformers_bare, V1, "tiny", depths=SHALLOW
    ),
    ("convnextv2_tiny backbone", "transformers without head"): case(
        reference.transformers_backbone, V2, "tiny", depths=SHALLOW
    ),
    ("convnext_tiny DINOv3", "transformers DINOv3"): case(
        reference.transformers_dinov3, "tiny", depths=SHALLOW
    ),
    ("convnext_tiny DINOv3 as published", "transformers DINOv3"): case(
        reference.transformers_dinov3, "tiny", depths=SHALLOW, nested=False
    ),
    ("convnext_tiny", "official"): case(reference.official_model, V1, "tiny", depths=SHALLOW),
    ("convnextv2_tiny", "official"): case(reference.official_model, V2, "tiny", depths=SHALLOW),
    ("convnext_tiny DINOv3 of Meta", "official"): case(
        reference.meta_dinov3, "tiny", depths=SHALLOW
    ),
    ("convnextv2_atto", "FCMAE sparse"): case(reference.fcmae, "atto", depths=SHALLOW, sparse=True),
    ("convnextv2_atto", "FCMAE dense"): case(reference.fcmae, "atto", depths=SHALLOW, sparse=False),
    ("convnext_iso_small", "official isotropic"): functools.partial(
        reference.isotropic, 18, 384, layer_scale=False
    ),
    ("convnext_iso_base", "official isotropic"): functools.partial(
        reference.isotropic, 18, 768, layer_scale=False
    ),
    ("convnext_iso_large", "official isotropic"): functools.partial(
        reference.isotropic, 3, 1024, layer_scale=True
    ),
    ("convnext_tiny", "torchvision"): case(reference.torchvision_model, "tiny", depths=SHALLOW),
    ("convnext_base", "torchvision"): case(reference.torchvision_model, "base", depths=SHALLOW),
    ("convnext_atto", "timm conv_mlp"): timm_case("convnext_atto"),
    ("convnext_femto", "timm conv_mlp"): timm_case("convnext_femto"),
    ("convnext_pico", "timm conv_mlp"): timm_case("convnext_pico"),
    ("convnext_nano", "timm conv_mlp"): timm_case("convnext_nano"),
    ("convnext_tiny", "timm"): timm_case("convnext_tiny", depths=SHALLOW),
    ("convnext_tiny_hnf", "timm hnf conv_mlp"): timm_case("convnext_tiny_hnf", depths=SHALLOW),
    ("convnext_base", "timm"): timm_case("convnext_base", depths=SHALLOW),
    ("convnext_large_mlp", "timm"): timm_case("convnext_large_mlp", depths=SIZES["large"][0]),
    ("convnext_xxlarge", "timm"): timm_case("convnext_xxlarge", depths=SIZES["xxlarge"][0]),
    ("convnextv2_atto", "timm conv_mlp"): timm_case("convnextv2_atto", depths=SHALLOW),
    ("convnextv2_tiny", "timm"): timm_case("convnextv2_tiny", depths=SHALLOW),
    ("convnext_base", "CLIP"): functools.partial(
        reference.clip_trunk, "convnext_base", depths=SHALLOW
    ),
}


def outputs(model, params, images, last):
    with nn.intercept_methods(compile_parts):
        maps = model.apply({"params": params}, images, method="feature_maps")
        named = {f"stage_{i}": features for i, features in enumerate(maps)}
        if last == "logits":
            named["logits"] = model.apply({"params": params}, images)
    return named


def outputs_and_gradients(model, params, images, last, weight):
    """The outputs of one pass, and the gradients of sum(weight · last output)."""
    named = {}

    def keep_maps(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, Stage) and context.method_name == "__call__":
            named[f"stage_{len(named)}"] = result
        return result

    def loss(params):
        if last == "logits":
            named["logits"] = model.apply({"params": params}, images)
        else:
            maps = model.apply({"params": params}, images, method="feature_maps")
            named.update({f"stage_{i}": features for i, features in enumerate(maps)})
        return (named[last] * weight).sum(), dict(named)

    with nn.intercept_methods(compile_parts), nn.intercept_methods(keep_maps):
        return jax.grad(loss, has_aux=True)(params)[::-1]


def pixels(height, width):
    rng = np.random.default_rng(height)
    return rng.normal(size=(1, height, width, 3)).astype(np.float32)


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def output_errors(actual, expected):
    """Greatest relative error of the logits, and of the feature maps."""
    assert actual.keys() == expected.keys()
    errors = {k: relative_error(actual[k], expected[k].detach().numpy()) for k in expected}
    return errors.pop("logits", None), max(errors.values())


def skip_without(layout):
    library = {"CLIP": "timm"}.get(layout, layout.split()[0])
    if library in ("timm", "torchvision"):
        pytest.importorskip(library)


@pytest.mark.parametrize(("variant", "layout"), CASES, ids=lambda text: text.replace(" ", "_"))
def test_agrees_with_pytorch(variant, layout):
    skip_without(layout)
    theirs = CASES[variant, layout](seed=len(variant))
    tensors = theirs.tensors()
    detected = detect(tensors)
    assert detected.layout.name == layout
    arguments = detected.arguments
    if variant == "convnext_xxlarge":
        # Known by its depths and widths, and here it is shallower.
        arguments = {**arguments, "norm_eps": 1e-5}
    model = ConvNeXt(**arguments)
    params = to_variables(tensors, detected)["params"]

    odd = pixels(225, 193)
    odd_logits, odd_maps = output_errors(
        outputs(model, params, odd, theirs.last), theirs.outputs(odd)
    )

    square = pixels(224, 224)
    side = 224 // model.strides[-1]
    has_logits = theirs.last == "logits"
    shape = (model.num_classes or model.dims[-1],) if has_logits else (side, side, model.dims[-1])
    weight = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    expected, tensors = theirs.gradients(square, weight)
    actual, ours = outputs_and_gradients(model, params, square, theirs.last, weight)
    logits, maps = output_errors(actual, expected)
    expected = traverse_util.flatten_dict(to_variables(tensors, detected)["params"], sep="/")
    ours = traverse_util.flatten_dict(ours, sep="/")
    assert ours.keys() == expected.keys()
    by_parameter = {
        k: relative_error(ours[k], expected[k])
        for k in expected
        # A backbone's other norms have no part in its last output.
        if expected[k].any() or np.any(ours[k])
    }
    worst = max(by_parameter, key=by_parameter.get)
    logits_text = " ".join("–" if e is None else f"{e:.1e}" for e in (logits, odd_logits))
    print(
        f"\n{variant:34} {layout:26} logits {logits_text:16} maps {maps:.1e} {odd_maps:.1e}  "
        f"gradients {by_parameter[worst]:.1e} ({worst})"
    )
    assert max(logits or 0.0, maps, odd_logits or 0.0, odd_maps) <= OUTPUT_TOLERANCE
    assert by_parameter[worst] <= GRADIENT_TOLERANCE


def test_a_wrong_epsilon_would_show_at_this_width():
    """tests/parity/test_golden_layouts.py tries all other slips, on smaller models."""
    theirs = case(reference.transformers_model, V2, "atto", depths=SHALLOW)(seed=0)
    tensors, odd = theirs.tensors(), pixels(225, 193)
    detected = detect(tensors)
    params = to_variables(tensors, detected)["params"]
    model = ConvNeXt(**{**detected.arguments, "norm_eps": 1e-5})
    errors = output_errors(outputs(model, params, odd, "logits"), theirs.outputs(odd))
    assert min(errors) > 100 * OUTPUT_TOLERANCE
