"""RandAugment and random erasing against timm's, TrivialAugmentWide against torchvision's."""

import contextlib
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from convnext_jax.data.erasing import erasing_box
from convnext_jax.data.operations import OPERATIONS
from convnext_jax.data.policies import TrivialAugmentWide, parse_policy

pytestmark = pytest.mark.parity

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
POLICY = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
TIMM = {
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}
EXACT = (
    *("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
)
MAGNITUDES = (0.0, 1.0, 4.3, 8.2, 9.0, 9.7)


@pytest.fixture(scope="module")
def timm_auto_augment():
    torch = pytest.importorskip("torch")
    # torchvision's compiled operators may be missing beside a CPU build; timm's data module only
    # wants to import them.
    with contextlib.suppress(RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm.data.auto_augment")


@pytest.fixture(scope="module")
def photographs():
    if not PHOTOGRAPHS.is_dir():
        from sklearn.datasets import load_sample_images

        images = [Image.fromarray(photo) for photo in load_sample_images().images]
    else:
        files = sorted(PHOTOGRAPHS.glob("*.JPEG"))[:: 500 // 6][:6]
        images = [Image.open(file).convert("RGB") for file in files]
    return [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) for image in images]


@pytest.mark.parametrize("name", parse_policy(POLICY).names[1:])
def test_operations_are_timms(name, timm_auto_augment, photographs, monkeypatch):
    """At the same magnitude and sign; factors differ by 2⁻¹⁴, hence a level now and then."""
    policy = parse_policy(POLICY)
    theirs_name = TIMM.get(name, name)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    one = jax.jit(lambda image, argument: OPERATIONS[name](image, argument, FILL, "bicubic"))
    differences = []
    for positive in (True, False):
        monkeypatch.setattr(random, "random", lambda positive=positive: 0.1 if positive else 0.9)
        for magnitude in MAGNITUDES:
            operation = timm_auto_augment.AugmentOp(
                theirs_name, prob=1.0, magnitude=magnitude, hparams=hparams
            )
            argument = policy.argument(
                name, jnp.float32(magnitude), jnp.float32(1 if positive else -1), 224, 224
            )
            if name == "Posterize" and float(argument) == 0:
                continue  # Pillow refuses 0 bits
            for photograph in photographs:
                ours = np.asarray(one(photograph.transpose(2, 0, 1), argument))
                theirs = np.asarray(operation(Image.fromarray(photograph))).transpose(2, 0, 1)
                differences.append(np.abs(ours.astype(int) - theirs))
    differences = np.stack(differences)
    print(f"{name}: mean {differences.mean():.5f}, most {differences.max()}")
    if name in ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"):
        assert differences.max() == 0
    elif name in EXACT:
        assert differences.max() <= 1
        assert differences.mean() < 0.02
    else:
        # A pixel at the border of the fill may fall to the other side.
        assert (differences > 1).mean() < 1e-3
        assert differences.mean() < 0.05


def test_arguments_follow_timms_law(timm_auto_augment):
    """Magnitude noise, clipping and signs: quantiles of an operation's argument."""
    policy = parse_policy(POLICY)
    keys = jax.random.split(jax.random.key(0), 60_000)
    operations, arguments = jax.jit(jax.vmap(lambda key: policy.draw(key, 224, 224)))(keys)
    operations, arguments = np.asarray(operations).ravel(), np.asarray(arguments).ravel()
    rng = random.Random(0)
    level_to_arg = timm_auto_augment.LEVEL_TO_ARG
    levels = np.linspace(0.02, 0.98, 25)
    for index, name in enumerate(policy.names):
        function = level_to_arg.get(TIMM.get(name, name))
        if name == "Identity" or function is None:
            continue
        random.seed(index)
        magnitudes = [min(10.0, max(0.0, rng.gauss(9, 0.5))) for _ in range(20_000)]
        theirs = np.array([function(m, {})[0] for m in magnitudes])
        if name.startswith("Translate"):
            theirs = theirs * 224
        ours = arguments[operations == index]
        spread = theirs.max() - theirs.min()
        np.testing.assert_allclose(
            np.quantile(np.abs(ours), levels),
            np.quantile(np.abs(theirs), levels),
            atol=0.05 * spread,
            err_msg=name,
        )


def test_boxes_follow_timms_law():
    torch = pytest.importorskip("torch")
    erasing = pytest.importorskip("timm.data.random_erasing")
    random.seed(0)
    theirs = erasing.RandomErasing(probability=1.0, mode="const", device="cpu")
    areas = [(theirs(torch.ones(1, 64, 64)) == 0).float().mean().item() for _ in range(4_000)]
    keys = jax.random.split(jax.random.key(0), 8_000)
    boxes = jax.jit(jax.vmap(lambda key: erasing_box(key, 64, 64, 1.0)))(keys)
    ours = np.asarray(boxes.rows).mean(1) * np.asarray(boxes.columns).mean(1)
    levels = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(ours, levels), np.quantile(areas, levels), atol=0.012)


def test_trivial_augment_wide_is_torchvisions():
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    policy = TrivialAugmentWide()
    space = autoaugment.TrivialAugmentWide()._augmentation_space(31)
    assert set(policy.names) == set(space)
    strengths, signed = policy.arguments()
    for name, row, both_ways in zip(policy.names, strengths, signed, strict=True):
        magnitudes, their_sign = space[name]
        wanted = np.broadcast_to(np.asarray(magnitudes, np.float32), 31)
        if name.startswith("Translate"):
            # Its linspace falls short of 16 by float32's rounding, which would then give 15.
            wanted = np.trunc(wanted + 1e-3)
        np.testing.assert_allclose(row, wanted, atol=1e-4, err_msg=name)
        assert bool(both_ways) == their_sign, name
