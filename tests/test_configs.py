"""Every file in configs/ is what its docstring says, and holds the figures of the papers."""

import io
import math
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from convnext_jax import config_checks, config_files, experiment, recipes
from convnext_jax.errors import UserError
from convnext_jax.models.roadmap_steps import STEPS
from convnext_jax.training.sharding import create_mesh
from convnext_jax.training.state import abstract_state

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

# ImageNet-1K and CIFAR-10: their published training sets. ImageNet-22K: the fall 2011 release's own
# count (image-net.org, 14,197,122 images of 21,841 synsets). Digits: four fifths of 1,797.
EXAMPLES = {
    "imagenet2012": 1_281_167,
    "imagenet21k": 14_197_122,
    "cifar10": 50_000,
    "digits": 1_438,
}
CLASSES = {"imagenet2012": 1000, "imagenet21k": 21_841, "cifar10": 10, "digits": 10}

# What all runs of the papers share (V1: table 5 and 6; V2: appendix A).
SHARED = {
    "optim.min_learning_rate": 1e-6,
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "optim.decayed": "kernels",
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "optim.clip_norm": None,
    "optim.accumulation_steps": 1,
    "mix.prob": 1.0,
    "mix.switch_prob": 0.5,
    "data.name": "imagenet2012",
    "data.train_split": "train",
    "data.eval_image_size": None,
    "data.repeats": 1,
    "loss.name": "cross_entropy",
    "loss.target_threshold": None,
    "loss.sum_classes": False,
    "augment.crop": "random_resized",
    "augment.crop_scale": (0.08, 1.0),
    "augment.flip": 0.5,
    "augment.interpolation": "bicubic",
    "augment.eval_crop_ratio": 0.875,
    "augment.mean": (0.485, 0.456, 0.406),
    "augment.std": (0.229, 0.224, 0.225),
    "augment.policy": "rand-m9-mstd0.5-inc1",
    "augment.policy_interpolation": "bicubic",
    "augment.color_jitter": 0.0,
    "augment.erasing_prob": 0.25,
    "augment.erasing_mode": "pixel",
    "mix.per_element": False,
    "on_nonfinite": "stop",
    "model.num_classes": None,
    "model.overrides": {},
    "model.dtype": "bfloat16",
    "model.batch_norm": "global",
}
MIXED = {"mix.mixup_alpha": 0.8, "mix.cutmix_alpha": 1.0, "mix.label_smoothing": 0.1}
UNMIXED = {"mix.mixup_alpha": 0.0, "mix.cutmix_alpha": 0.0, "mix.label_smoothing": 0.1}
NO_LAYER_DECAY = {"optim.layer_decay": None, "optim.layer_decay_grouping": "group"}

ONE_K = {
    **SHARED,
    **MIXED,
    **NO_LAYER_DECAY,
    "batch_size": 4096,
    "total": "300 epochs",
    "optim.warmup": "20 epochs",
    "optim.learning_rate": 4e-3,
    "optim.weight_decay": 0.05,
    "ema_decay": 0.9999,
    "model.head_init_scale": 1.0,
    "init_from": None,
    "data.image_size": 224,
    "data.eval_split": "validation",
    "mix.group_size": 128,
}
ISOTROPIC = {**ONE_K, "optim.warmup": "50 epochs"}
TWENTY_TWO_K = {
    **ONE_K,
    "total": "90 epochs",
    "optim.warmup": "5 epochs",
    "ema_decay": None,
    "model.num_classes": 21_841,
    "data.name": "imagenet21k",
    "data.eval_split": "",
    "mix.group_size": 32,
}
FINE_TUNE = {
    **SHARED,
    **UNMIXED,
    "batch_size": 512,
    "total": "30 epochs",
    "optim.warmup": "0 epochs",
    "optim.learning_rate": 5e-5,
    "optim.weight_decay": 1e-8,
    "optim.layer_decay": 0.8,
    "optim.layer_decay_grouping": "group",
    "ema_decay": None,
    "model.head_init_scale": 0.001,
    "init_from": "",
    "data.image_size": 224,
    "data.eval_split": "validation",
    "mix.group_size": 32,
}
TO_384 = {**FINE_TUNE, "data.image_size": 384, "optim.layer_decay": 0.7}
# Learning rates of V2 are the authors' base rates × 1024 / 256.
V2 = {
    **SHARED,
    **MIXED,
    "batch_size": 1024,
    "optim.weight_decay": 0.05,
    "ema_decay": 0.9999,
    "model.head_init_scale": 0.001,
    "init_from": "",
    "data.image_size": 224,
    "data.eval_split": "validation",
    "mix.group_size": 32,
}
V2_SMALL = {
    **V2,
    **UNMIXED,
    "mix.label_smoothing": 0.2,
    "total": "600 epochs",
    "optim.warmup": "0 epochs",
    "optim.learning_rate": 8e-4,
    "optim.weight_decay": 0.3,
    "optim.layer_decay": 0.9,
    "optim.layer_decay_grouping": "single",
    "model.drop_path_rate": 0.1,
}


def v2(rate: float, epochs: int, warmup: int, decay: float, grouping: str, drop: float) -> dict:
    return {
        **V2,
        "optim.learning_rate": rate,
        "total": f"{epochs} epochs",
        "optim.warmup": f"{warmup} epochs",
        "optim.layer_decay": decay,
        "optim.layer_decay_grouping": grouping,
        "model.drop_path_rate": drop,
    }


def model(size: str, drop_path_rate: float, **further: object) -> dict:
    return {"model.name": f"convnext_{size}", "model.drop_path_rate": drop_path_rate, **further}


PHOTOS = {
    **FINE_TUNE,
    "batch_size": 64,
    "data.name": "folder",
}
CIFAR10 = {
    **SHARED,
    **NO_LAYER_DECAY,
    **model("atto", 0.1),
    "batch_size": 128,
    "total": "50 epochs",
    "optim.warmup": "5 epochs",
    "optim.learning_rate": 2e-3,
    "optim.weight_decay": 0.05,
    "ema_decay": 0.999,
    "mix.mixup_alpha": 0.2,
    "mix.cutmix_alpha": 1.0,
    "mix.prob": 0.5,
    "mix.label_smoothing": 0.1,
    "mix.group_size": 32,
    "model.head_init_scale": 1.0,
    "model.dtype": "float32",
    "model.overrides": {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 256), "patch_size": 2},
    "init_from": None,
    "data.image_size": 32,
    "augment.crop": "pad",
    "augment.crop_padding": 4,
    "augment.policy": "",
    "augment.erasing_prob": 0.0,
    "augment.mean": (0.4914, 0.4822, 0.4465),
    "augment.std": (0.2470, 0.2435, 0.2616),
}

# By file, and what may follow the colon. digits.py is held to its accuracy by a test of its own.
TABLE = {
    "tiny": {**ONE_K, **model("tiny", 0.1)},
    "small": {**ONE_K, **model("small", 0.4)},
    "base": {**ONE_K, **model("base", 0.5)},
    "large": {**ONE_K, **model("large", 0.5), "mix.group_size": 64},
    "iso_small": {**ISOTROPIC, **model("iso_small", 0.1)},
    "iso_base": {**ISOTROPIC, **model("iso_base", 0.2)},
    "iso_large": {**ISOTROPIC, **model("iso_large", 0.5), "mix.group_size": 64},
    "tiny_22k": {**TWENTY_TWO_K, **model("tiny", 0.0)},
    "small_22k": {**TWENTY_TWO_K, **model("small", 0.0)},
    "base_22k": {**TWENTY_TWO_K, **model("base", 0.1)},
    "large_22k": {**TWENTY_TWO_K, **model("large", 0.1)},
    "xlarge_22k": {**TWENTY_TWO_K, **model("xlarge", 0.2)},
    "base_384": {**TO_384, **model("base", 0.8)},
    "large_384": {**TO_384, **model("large", 0.95)},
    "tiny_22k_ft_1k": {**FINE_TUNE, **model("tiny", 0.0)},
    "small_22k_ft_1k": {**FINE_TUNE, **model("small", 0.1)},
    "base_22k_ft_1k": {**FINE_TUNE, **model("base", 0.2)},
    "large_22k_ft_1k": {**FINE_TUNE, **model("large", 0.3)},
    "xlarge_22k_ft_1k": {**FINE_TUNE, **model("xlarge", 0.4), "ema_decay": 0.9999},
    "v2_atto": {**V2_SMALL, "model.name": "convnextv2_atto"},
    "v2_femto": {**V2_SMALL, "model.name": "convnextv2_femto"},
    "v2_pico": {**V2_SMALL, "model.name": "convnextv2_pico"},
    "v2_nano": {**V2_SMALL, "model.name": "convnextv2_nano"},
    "v2_tiny": {**v2(3.2e-3, 300, 40, 0.9, "single", 0.2), "model.name": "convnextv2_tiny"},
    "v2_base": {**v2(2.5e-3, 100, 20, 0.6, "group", 0.1), "model.name": "convnextv2_base"},
    "v2_large": {**v2(2.5e-3, 100, 20, 0.6, "group", 0.2), "model.name": "convnextv2_large"},
    "v2_huge": {**v2(5e-3, 50, 10, 0.75, "single", 0.3), "model.name": "convnextv2_huge"},
    "cifar10": {**CIFAR10, "data.name": "cifar10", "data.eval_split": "test"},
    "cifar10:tfds": {**CIFAR10, "data.name": "cifar10", "data.eval_split": "test"},
    "cifar10:folder": {**CIFAR10, "data.name": "folder", "data.eval_split": "validation"},
    "finetune_folder": {**PHOTOS, **model("tiny", 0.1)},
    "finetune_folder:convnext_base": {**PHOTOS, **model("base", 0.1)},
    "digits": {
        "data.name": "digits",
        "data.image_size": 8,
        "augment.flip": 0.0,
        "augment.policy": "",
        "augment.erasing_prob": 0.0,
    },
}
# Torchvision's reference for its first weights: the defaults of its `train.py`, on 8 GPUs.
RESNET_ORIGINAL = {
    **SHARED,
    **NO_LAYER_DECAY,
    "model.name": "resnet50",
    "model.batch_norm": "per_device",
    "model.drop_path_rate": 0.0,
    "model.head_init_scale": 1.0,
    "init_from": None,
    "batch_size": 256,
    "total": "90 epochs",
    "ema_decay": None,
    "data.image_size": 224,
    "data.eval_split": "validation",
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.nesterov": False,
    "optim.learning_rate": 0.1,
    "optim.min_learning_rate": 0.0,
    "optim.schedule": "step",
    "optim.decay_every": "30 epochs",
    "optim.decay_rate": 0.1,
    "optim.warmup": "0 epochs",
    "optim.weight_decay": 1e-4,
    "optim.decayed": "all",
    "augment.interpolation": "bilinear",
    "augment.policy": "",
    "augment.erasing_prob": 0.0,
    "mix.mixup_alpha": 0.0,
    "mix.cutmix_alpha": 0.0,
    "mix.label_smoothing": 0.0,
}
# arXiv 2110.00476, table 2; eps, clipping and the threshold: docs/recipes.md. With three copies of
# each image the batch is 2016 for the table's 2048.
STRIKES_BACK = {
    **SHARED,
    **NO_LAYER_DECAY,
    "model.name": "resnet50",
    "model.overrides": {"zero_init_residual": True},
    "model.head_init_scale": 1.0,
    "init_from": None,
    "ema_decay": None,
    "data.eval_split": "validation",
    "data.eval_image_size": 224,
    "augment.eval_crop_ratio": 0.95,
    "augment.erasing_prob": 0.0,
    "mix.cutmix_alpha": 1.0,
    "loss.name": "binary_cross_entropy",
    "loss.target_threshold": 0.2,
    "optim.name": "lamb",
    "optim.warmup": "5 epochs",
    "optim.eps": 1e-6,
    "optim.clip_norm": 1.0,
}
A1 = {
    **STRIKES_BACK,
    "total": "600 epochs",
    "batch_size": 2016,
    "data.image_size": 224,
    "data.repeats": 3,
    "optim.learning_rate": 5e-3,
    "optim.weight_decay": 0.01,
    "model.drop_path_rate": 0.05,
    "augment.policy": "rand-m7-mstd0.5-inc1",
    "mix.mixup_alpha": 0.2,
    "mix.label_smoothing": 0.1,
    "mix.group_size": 504,
}
A2 = {
    **A1,
    "total": "300 epochs",
    "optim.weight_decay": 0.02,
    "mix.mixup_alpha": 0.1,
    "mix.label_smoothing": 0.0,
}
A3 = {
    **STRIKES_BACK,
    "total": "100 epochs",
    "batch_size": 2048,
    "data.image_size": 160,
    "data.repeats": 1,
    "optim.learning_rate": 8e-3,
    "optim.weight_decay": 0.02,
    "model.drop_path_rate": 0.0,
    "augment.policy": "rand-m6-mstd0.5-inc1",
    "mix.mixup_alpha": 0.1,
    "mix.label_smoothing": 0.0,
    "mix.group_size": 512,
}
# arXiv 2103.14030, appendix A2.1, and the authors' `config.py`, whose rates are per 512 images.
SWIN = {
    **ONE_K,
    "batch_size": 1024,
    "optim.learning_rate": 5e-4 * 1024 / 512,
    "optim.min_learning_rate": 5e-6 * 1024 / 512,
    "optim.clip_norm": 5.0,
    "ema_decay": None,
}
# ConvNeXt, appendix A.1: table 5, but for the average. Table 5 has .1 for T and .5 for B.
ROADMAP = {**ONE_K, "ema_decay": None}
TABLE |= {
    "resnet50": RESNET_ORIGINAL,
    "resnet50_a1": A1,
    "resnet50_a2": A2,
    "resnet50_a3": A3,
    "swin_tiny": {**SWIN, "model.name": "swin_tiny", "model.drop_path_rate": 0.2},
    "swin_small": {**SWIN, "model.name": "swin_small", "model.drop_path_rate": 0.3},
    "swin_base": {**SWIN, "model.name": "swin_base", "model.drop_path_rate": 0.5},
}
TABLE |= {
    f"roadmap:{road}/{step.name}": {
        **(
            RESNET_ORIGINAL
            if step.name == "00_resnet"
            else {**ROADMAP, "model.drop_path_rate": rate}
        ),
        "model.name": f"roadmap_{road}/{step.name}",
    }
    for road, rate in (("t", 0.1), ("b", 0.5))
    for step in STEPS
}
TABLE |= {
    f"{name}:{size}": {**TABLE[name], "data.image_size": size}
    for name in list(TABLE)
    if name.endswith("_ft_1k")
    for size in (224, 384)
}

# Some say the same in two ways; what is slow is tried on one of them.
# Of the comparisons some stand for others that differ in a number, or in the network's size.
ALIKE = ("resnet50_a2", "swin_small", "swin_base")
ROAD_TRIED = ("roadmap:t/00_resnet", "roadmap:t/16_convnext")
DISTINCT = [
    v
    for i, v in enumerate(TABLE)
    if TABLE[v] not in list(TABLE.values())[:i]
    and v not in ALIKE
    and (not v.startswith("roadmap:") or v in ROAD_TRIED)
]

# Of ImageNet-1K at 224 pixels (and at 384, where a file knows both): the papers' tables and, for
# what they leave out, the authors' READMEs.
TOP1 = {
    "tiny": [82.1],
    "small": [83.1],
    "base": [83.8],
    "large": [84.3],
    "iso_small": [79.7],
    "iso_base": [82.0],
    "iso_large": [82.6],
    "base_384": [85.1],
    "large_384": [85.5],
    "tiny_22k": [82.9],
    "small_22k": [84.6],
    "base_22k": [85.8],
    "large_22k": [86.6],
    "xlarge_22k": [87.0],
    "tiny_22k_ft_1k": [82.9, 84.1],
    "small_22k_ft_1k": [84.6, 85.8],
    "base_22k_ft_1k": [85.8, 86.8],
    "large_22k_ft_1k": [86.6, 87.5],
    "xlarge_22k_ft_1k": [87.0, 87.8],
    "v2_atto": [76.7],
    "v2_femto": [78.5],
    "v2_pico": [80.3],
    "v2_nano": [81.9],
    "v2_tiny": [83.0],
    "v2_base": [84.9],
    "v2_large": [85.8],
    "v2_huge": [86.3],
    # ResNet strikes back; Swin, table 1; torchvision. The road: its first and last steps.
    "resnet50": [76.1],
    "resnet50_a1": [80.4],
    "resnet50_a2": [79.8],
    "resnet50_a3": [78.1],
    "swin_tiny": [81.3],
    "swin_small": [83.0],
    "swin_base": [83.5],
    "roadmap": [76.1, 82.0, 78.2, 83.6],
}

# Steps per epoch, in all, and of the warm-up: whole batches only, section D of the reference.
STEP_COUNTS = {
    ("imagenet2012", "300 epochs", "20 epochs", 4096): (312, 93_600, 6_240),
    ("imagenet2012", "300 epochs", "50 epochs", 4096): (312, 93_600, 15_600),
    ("imagenet21k", "90 epochs", "5 epochs", 4096): (3_466, 311_940, 17_330),
    ("imagenet2012", "30 epochs", "0 epochs", 512): (2_502, 75_060, 0),
    ("imagenet2012", "600 epochs", "0 epochs", 1024): (1_251, 750_600, 0),
    ("imagenet2012", "300 epochs", "40 epochs", 1024): (1_251, 375_300, 50_040),
    ("imagenet2012", "100 epochs", "20 epochs", 1024): (1_251, 125_100, 25_020),
    ("imagenet2012", "50 epochs", "10 epochs", 1024): (1_251, 62_550, 12_510),
    ("imagenet2012", "90 epochs", "0 epochs", 256): (5_004, 450_360, 0),
    ("imagenet2012", "600 epochs", "5 epochs", 2016): (635, 381_000, 3_175),
    ("imagenet2012", "300 epochs", "5 epochs", 2016): (635, 190_500, 3_175),
    ("imagenet2012", "100 epochs", "5 epochs", 2048): (625, 62_500, 3_125),
    ("imagenet2012", "300 epochs", "20 epochs", 1024): (1_251, 375_300, 25_020),
    ("cifar10", "50 epochs", "5 epochs", 128): (390, 19_500, 1_950),
    ("digits", "200 epochs", "5 epochs", 128): (11, 2_200, 55),
}


# A file that can't be loaded without an argument, and one to load it with.
NEEDS_ARGUMENT = {"roadmap": "roadmap:t/07_dw_first"}


def load(variant: str, *overrides: str) -> ConfigDict:
    name, colon, argument = variant.partition(":")
    return config_files.load_config(
        str(ROOT / "configs" / f"{name}.py") + colon + argument, overrides
    )


def docstring(name: str) -> str:
    return (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]


def commands(name: str) -> list[list[str]]:
    """The docstring's commands, each as the shell would split it."""
    text = docstring(name).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip().startswith("python ")]


def num_examples(config: ConfigDict) -> int:
    # A user's folder may hold any number; this one is small.
    return EXAMPLES.get(config.data.name, 1_000)


def test_table_is_complete():
    assert {variant.split(":")[0] for variant in TABLE} == set(CONFIGS)
    unmeasured = {"cifar10", "digits", "finetune_folder"}
    assert set(TOP1) == set(CONFIGS) - unmeasured


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_commands_load(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands(name)
    for command in commands(name):
        assert command[:3] == ["python", "-m", "convnext_jax.train"]
        options = dict(zip(command[3:6:2], command[4:7:2], strict=True))
        assert set(options) == {"--config", "--workdir"}
        path, _, argument = options["--config"].partition(":")
        assert path == f"configs/{name}.py"
        assert (f"{name}:{argument}" if argument else name) in TABLE
        config = config_files.load_config(options["--config"], command[7:])
        assert config.init_from != "", "the command must say what to start from"


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_names_hardware_and_accuracy(name):
    text = " ".join(docstring(name).split())
    config = load(NEEDS_ARGUMENT.get(name, name))
    assert "Meant for" in text
    slices = [int(n) for n in re.findall(r"slice of (\d+)", text)]
    for chips in slices:
        experiment.check_batch_sizes(config, chips)
    for per_chip in re.findall(r"\((\d+) images a chip\)", text)[:1]:
        assert int(per_chip) * slices[0] == config.batch_size
    expected = re.search(r"[Ee]xpected top-1(.*)", text)
    assert expected
    if name in TOP1:
        figures = [float(figure) for figure in re.findall(r"(\d+(?:\.\d+)?) %", expected[1])]
        assert figures == TOP1[name]
        assert re.search(
            r"\(paper, table \d\)|\(the authors' README\)|\(README of ConvNeXt V2\)"
            r"|\(ResNet strikes back\)|\(Swin, table \d\)|\(torchvision, 76\.130;"
            r"|tables 10 and 11 of the paper",
            text,
        )


@pytest.mark.parametrize("variant", TABLE)
def test_values(variant):
    config = load(variant)
    config_checks.check_fields(config)
    for field, value in TABLE[variant].items():
        found = config
        for key in field.split("."):
            found = found[key]
        if isinstance(found, ConfigDict):
            found = found.to_dict()
        assert found == value, field


@pytest.mark.parametrize("variant", DISTINCT)
def test_steps_and_schedule(variant):
    config = load(variant)
    steps = experiment.durations(config, num_examples(config))
    key = (config.data.name, config.total, config.optim.warmup, config.batch_size)
    if config.data.name != "folder":
        assert steps[:1] + steps[1:3] == STEP_COUNTS[key]

    net = experiment.build_model(config, 10, 8)
    _, schedule = experiment.build_optimizer(config, net, steps)
    if config.optim.schedule == "step":
        return  # test_original_resnets_learning_rate
    peak, low = config.optim.learning_rate, config.optim.min_learning_rate
    total, warmup = steps.total, steps.warmup
    assert schedule(0) == (0.0 if warmup else np.float32(peak))
    np.testing.assert_allclose(schedule(max(warmup - 1, 0)), peak, rtol=1e-6)
    np.testing.assert_allclose(schedule(warmup), peak, rtol=1e-6)
    last = low + (peak - low) / 2 * (1 + math.cos(math.pi * (1 - 1 / (total - warmup))))
    np.testing.assert_allclose(schedule(total - 1), last, rtol=1e-4, atol=5e-10)


@pytest.mark.parametrize("variant", DISTINCT)
def test_builds(variant):
    config = load(variant)
    experiment.build_mixing(config)
    augmentation = experiment.build_augmentation(config)
    assert (augmentation.policy is None) == (config.augment.policy == "")
    assert (augmentation.erasing is None) == (config.augment.erasing_prob == 0)
    experiment.train_transform(config)
    classes = CLASSES.get(config.data.name, 10)
    net = experiment.build_model(config, classes, 8)
    steps = experiment.durations(config, num_examples(config))
    optimizer, _ = experiment.build_optimizer(config, net, steps)
    size = config.data.image_size
    # Raises where a parameter, moment or average matches no partition rule.
    state = abstract_state(
        net,
        optimizer,
        (size, size, 3),
        create_mesh(data=-1, fsdp=2),
        ema=config.ema_decay is not None,
    )
    assert state.params["head"]["kernel"].shape[-1] == classes
    assert (state.ema_params is None) == (config.ema_decay is None)
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    cut = [leaf for leaf in kernels if not leaf.sharding.is_fully_replicated]
    assert cut, "nothing would be cut along fsdp"
    moments = jax.tree.leaves(jax.eval_shape(optimizer.init, state.params))
    per_parameter = 1 if config.optim.name == "sgd" else 2
    assert sum(leaf.size for leaf in moments if leaf.ndim > 1) == per_parameter * sum(
        kernel.size for kernel in kernels
    )


def test_original_resnets_learning_rate():
    config = load("resnet50")
    steps = experiment.durations(config, 1_281_167)
    _, schedule = experiment.build_optimizer(config, experiment.build_model(config, 10, 8), steps)
    epoch = steps.steps_per_epoch
    for first, last, rate in ((0, 30, 0.1), (30, 60, 0.01), (60, 90, 0.001)):
        for step in (first * epoch, last * epoch - 1):
            assert schedule(step) == np.float32(rate)


def test_every_field_of_a_comparison_is_in_the_table():
    # What says how a run is watched and kept, how fast it is, or does not apply to it.
    operation = r"(seed|on_\w+|spike_\w+|log_every|eval_\w+|checkpoint\w+|mesh\..*"
    operation += r"|model\.(remat|scan_blocks)"
    operation += r"|data\.(data_dir|validation_fraction|workers|decoder|on_bad_image)"
    operation += r"|augment\.crop_padding|optim\.(momentum|nesterov|decay_rate|decay_every)"
    operation += r"|mix\.group_size)"
    fields = [name.removeprefix("config.") for name in config_files.field_names(recipes.base())]
    fields = [name for name in fields if not re.fullmatch(operation, name)]
    assert len(fields) > 50
    for variant in ("resnet50", "resnet50_a1", "resnet50_a3", "swin_tiny", "roadmap:t/05_width"):
        assert [name for name in fields if name not in TABLE[variant]] == []


def test_a3_trains_at_160_pixels_and_is_evaluated_at_224():
    config = load("resnet50_a3")
    assert experiment.train_transform(config).image_size == 160
    evaluation = experiment.eval_transform(config)
    assert (evaluation.image_size, evaluation.crop_ratio) == (224, 0.95)
    assert experiment.eval_transform(load("resnet50")).image_size == 224


def test_both_classes_of_a_mixed_image_are_present():
    config = load("resnet50_a1")
    logits, targets = np.zeros((1, 4), np.float32), np.float32([[0.6, 0.35, 0.05, 0.0]])
    loss = experiment.build_loss(config)
    # The logits' gradient is (1/2 - target) / 4, and tells the targets.
    found = 0.5 - 4 * jax.grad(loss)(logits, targets)
    np.testing.assert_allclose(found, [[0.925, 0.925, 0.025, 0.025]], atol=1e-6)
    found = 0.5 - 4 * jax.grad(experiment.build_loss(load("resnet50_a2")))(logits, targets)
    np.testing.assert_allclose(found, [[1, 1, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "override", "wanted"),
    [
        ("tiny", "--config.optim.name=adam", "optim.name is 'adam'"),
        ("tiny", "--config.optim.schedule=linear", "optim.schedule is 'linear'"),
        ("tiny", "--config.optim.decayed=none", "optim.decayed is 'none'"),
        ("resnet50", "--config.optim.decay_every=0 steps", "decay_every is '0 steps'"),
        ("resnet50", "--config.optim.decay_every=often", "config.optim.decay_every is 'often'"),
        ("swin_tiny", "--config.optim.layer_decay=0.8", "layer_decay is 0.8"),
        ("base_384", "--config.optim.name=lamb", "layer_decay is 0.7"),
    ],
)
def test_mistakes_in_the_optimizer_are_named(variant, override, wanted):
    config = load(variant, override)
    steps = experiment.durations(config, num_examples(config))
    model = experiment.build_model(config, 10, 8)
    with pytest.raises(UserError, match=wanted):
        experiment.build_optimizer(config, model, steps)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("--config.loss.name=hinge", "loss.name is 'hinge'"),
        ("--config.loss.target_threshold=0.2", "loss.target_threshold is 0.2, which goes with"),
        ("--config.loss.sum_classes", "loss.sum_classes is True, which goes with"),
    ],
)
def test_mistakes_in_the_loss_are_named(override, wanted):
    with pytest.raises(UserError, match=wanted):
        experiment.build_loss(load("tiny", override))


def test_a_missing_or_wrong_step_lists_them_all():
    for variant in ("roadmap", "roadmap:t", "roadmap:t/7", "roadmap:s/07_dw_first"):
        with pytest.raises(UserError) as caught:
            load(variant)
        assert [step.name for step in STEPS if step.name not in str(caught.value)] == []


def test_whole_image_is_seen_from_384_pixels_on():
    # A frame of a twentieth of the side lies outside of a crop of .875, which leaves a sixteenth.
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[:20] = pixels[-20:] = pixels[:, :20] = pixels[:, -20:] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    for size, frame_is_seen in ((224, False), (384, True)):
        config = load(f"base_22k_ft_1k:{size}")
        image = experiment.eval_transform(config)(file.getvalue())
        assert image.shape == (size, size, 3)
        assert (image[0].mean() > 200) == frame_is_seen


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("--config.batch_size=64", "batch_size", 64),
        ("--config.optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
        ("--config.optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("--config.model.remat", "model.remat", True),
        ("--config.model.remat=true", "model.remat", True),
        ("--noconfig.model.remat", "model.remat", False),
        ("--config.model.remat=depthwise", "model.remat", "depthwise"),
        ("--config.model.scan_blocks", "model.scan_blocks", True),
        ("--config.total=5 steps", "total", "5 steps"),
        ("--config.augment.policy=ta_wide", "augment.policy", "ta_wide"),
        ("--config.augment.policy=", "augment.policy", ""),
        ("--config.augment.crop_scale=(0.25, 1.0)", "augment.crop_scale", (0.25, 1.0)),
        ("--config.model.overrides.depths=(1,1,1,1)", "model.overrides.depths", (1, 1, 1, 1)),
        # Placeholders take their type, and None.
        ("--config.model.num_classes=7", "model.num_classes", 7),
        ("--config.optim.clip_norm=1", "optim.clip_norm", 1.0),
        ("--config.init_from=runs/tiny", "init_from", "runs/tiny"),
        ("--config.init_from=None", "init_from", None),
        ("--config.ema_decay=None", "ema_decay", None),
    ],
)
def test_overrides_arrive(override, field, value):
    found = load("cifar10", override)
    for key in field.split("."):
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_fine_tuning_from_random_weights_can_be_asked_for():
    assert load("base_384").init_from == ""
    assert load("base_384", "--config.init_from=None").init_from is None


def test_last_override_counts():
    assert load("tiny", "--config.ema_decay=0.9", "--config.ema_decay=None").ema_decay is None
    assert load("tiny", "--config.ema_decay=None", "--config.ema_decay=0.9").ema_decay == 0.9


@pytest.mark.parametrize(
    ("variant", "override"),
    [
        ("tiny", "--config.batch_size=1.5"),
        ("tiny", "--config.batch_size=None"),
        ("tiny", "--config.ema_decay=much"),
        ("tiny", "--config.optim.learning_rat=1"),
        ("tiny:384", "--config.seed=1"),
        ("tiny_22k_ft_1k:wide", "--config.seed=1"),
        ("cifar10:elsewhere", "--config.seed=1"),
    ],
)
def test_mistakes_end_in_one_sentence(variant, override):
    with pytest.raises(UserError):
        load(variant, override)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("--config.augment.policy=rand-m9-q3", "'q3' is unknown"),
        ("--config.augment.policy_interpolation=nearest", "policy_interpolation is 'nearest'"),
        ("--config.augment.erasing_mode=blur", "erasing_mode is 'blur'"),
    ],
)
def test_mistakes_in_the_augmentation_are_named(override, wanted):
    with pytest.raises(UserError, match=wanted):
        experiment.build_augmentation(load("tiny", override))


def test_what_geometric_operations_bring_in():
    assert experiment.build_augmentation(load("tiny")).fill == (124, 116, 104)
    black = load("tiny", "--config.augment.policy=ta_wide")
    assert experiment.build_augmentation(black).fill == (0, 0, 0)


def test_color_jitter_follows_the_policy():
    config = load("tiny", "--config.augment.policy=3-augment", "--config.augment.color_jitter=0.3")
    policy = experiment.build_augmentation(config).policy
    assert policy.names == (
        *("Grayscale", "Solarize", "GaussianBlur"),
        *("Brightness", "Contrast", "Color"),
    )
    alone = load("tiny", "--config.augment.policy=", "--config.augment.color_jitter=0.3")
    assert experiment.build_augmentation(alone).policy.length == 3


def test_two_configs_in_one_process():
    first = load("tiny", "--config.batch_size=64")
    second = load("base")
    again = load("tiny")
    assert (first.model.name, first.batch_size) == ("convnext_tiny", 64)
    assert (second.model.name, second.batch_size) == ("convnext_base", 4096)
    assert again.batch_size == 4096


@pytest.mark.parametrize("field", ["depthwise", "mlp"])
def test_kernels_that_these_devices_lack_are_refused(field):
    config = config_files.load_config("digits", [f"--config.model.overrides.{field}=pallas"])
    model, mesh = experiment.build_model(config, 10, 1), create_mesh()
    with pytest.raises(UserError, match=rf"overrides\.{field} is 'pallas'.*'cpu'"):
        experiment.check_kernels(model, mesh)
    experiment.check_kernels(experiment.build_model(recipes.base(), 10, 1), mesh)
