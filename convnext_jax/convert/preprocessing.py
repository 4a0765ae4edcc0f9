"""What an image goes through before a published model: each family has its own."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from convnext_jax.convert.detection import Detected
from convnext_jax.data.transforms import EvalTransform
from convnext_jax.errors import UserError

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# OpenAI's, which open_clip and timm keep to.
_CLIP: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
# The default of transformers' image processor.
_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# From this size on the authors, and transformers, resize the whole image and crop nothing.
_WHOLE_IMAGE_FROM = 384
_CROP_RATIO = 0.875

# torchvision found these by search over its own files.
_TORCHVISION_RESIZE = {
    "convnext_tiny": 236,
    "convnext_small": 230,
    "swin_small": 246,
    "swin_base": 238,
}
_TORCHVISION_RESIZE_OTHERS = 232
# What its second, newly trained weights of resnet50, 101 and 152 have in their names.
_TORCHVISION_V2 = ("11ad3fa6", "cd907fc2", "f82ba261")

# Pillow's numbers of its filters, as transformers' preprocessor_config.json has them.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Decoded RGB image → the model's input.

    Attributes:
      image_size: S, the side of the input in pixels.
      resize_size: the short side, in pixels, before the centre crop of S × S; None where the whole
        image is resized to S × S and nothing is cropped.
      interpolation: Pillow's filter, antialiased: "bicubic" or another.
      mean: per channel, of pixels in [0, 1].
      std: per channel.
      note: how this is known, where it is a guess; or what else the weights were evaluated with.
    """

    image_size: int = 224
    resize_size: int | None = 256
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = _IMAGENET["mean"]
    std: tuple[float, ...] = _IMAGENET["std"]
    note: str = ""

    def transform(self) -> EvalTransform:
        """The part up to uint8 pixels (S, S, 3); mean and std are applied on the accelerator."""
        if self.resize_size is None:
            return EvalTransform(self.image_size, squash=True, interpolation=self.interpolation)
        return EvalTransform(
            self.image_size, resize_size=self.resize_size, interpolation=self.interpolation
        )

    def at_size(self, image_size: int) -> Preprocessing:
        """The same for another resolution: the crop keeps its share of the image.

        Args:
          image_size: side of the input in pixels.
        """
        if self.resize_size is None:
            return dataclasses.replace(self, image_size=image_size)
        resize_size = max(image_size, int(image_size * self.resize_size / self.image_size))
        return dataclasses.replace(self, image_size=image_size, resize_size=resize_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()
        }
        return cls(**fields)


def preprocessing_for(
    source: str, metadata: Mapping[str, Any], detected: Detected
) -> Preprocessing:
    """Finds the preprocessing with which weights were evaluated.

    What lies beside the weights comes first: timm's `pretrained_cfg` in "config", transformers'
    "preprocessor_config", open_clip's `preprocess_cfg`. Without them it is the default of who
    published them, at a resolution that the source's name tells (`…_384.pth`), since tensors
    rarely do.

    Args:
      source: path, URL or hub name of the file.
      metadata: what lies beside the tensors.
      detected: what the file holds.

    Returns:
      The preprocessing; its `note` says if it was guessed.

    Raises:
      UserError: if a config asks for what this library can't do.
    """
    name = _telling_name(source)
    config = metadata.get("config") or {}
    # timm's ResNets bear torchvision's names.
    if detected.layout.origin in ("timm", "torchvision") and "pretrained_cfg" in config:
        return _from_timm(config["pretrained_cfg"])
    return _BY_FAMILY[detected.family.name](name, metadata, detected)


def _of_convnext(name: str, metadata: Mapping[str, Any], detected: Detected) -> Preprocessing:
    origin, size = detected.layout.origin, _size_in(name)
    if origin == "timm":
        return _timm_default(name, size)
    if origin == "clip":
        config = metadata.get("open_clip_config") or metadata.get("config") or {}
        stored = config.get("preprocess_cfg") or {}
        found = Preprocessing(size or 256, size or 256, **{**_CLIP, **_mean_std(stored)})
        return _guessed(found, "CLIP's own evaluation", size)
    if origin == "torchvision":
        resize = _TORCHVISION_RESIZE.get(detected.model_name or "", _TORCHVISION_RESIZE_OTHERS)
        return Preprocessing(224, resize, interpolation="bilinear")
    processor = metadata.get("preprocessor_config")
    if origin in ("transformers", "dinov3") and processor:
        return _from_transformers(processor, origin)
    if origin == "dinov3":
        return Preprocessing(224, None, interpolation="bilinear")
    return _guessed(_authors(size or 224), "the authors' own evaluation", size)


def _of_resnet(name: str, metadata: Mapping[str, Any], detected: Detected) -> Preprocessing:
    if any(digest in name for digest in _TORCHVISION_V2):
        return Preprocessing(224, 232, interpolation="bilinear")
    found = Preprocessing(224, 256, interpolation="bilinear")
    if re.search(r"-[0-9a-f]{8}\.pth$", name):
        return found
    note = "the preprocessing is that of torchvision's first weights; its second have 232 for 256"
    return dataclasses.replace(found, note=note)


def _of_swin(name: str, metadata: Mapping[str, Any], detected: Detected) -> Preprocessing:
    origin, processor = detected.layout.origin, metadata.get("preprocessor_config")
    if origin == "transformers" and processor:
        return _from_transformers(processor, "vit")
    if origin == "torchvision":
        resize = _TORCHVISION_RESIZE.get(detected.model_name or "", _TORCHVISION_RESIZE_OTHERS)
        return Preprocessing(224, resize)
    told = detected.image_size or _size_in(name)
    # Published are 224 for windows of 7 and 384 for 12, at which all maps are whole windows.
    size = told or 32 * detected.arguments["window_size"]
    if origin == "timm":
        found = Preprocessing(size, size if size >= _WHOLE_IMAGE_FROM else math.floor(size / 0.9))
        whose = "what timm's Swins have (no config.json lies beside the weights)"
    else:
        found, whose = _authors(size), "the authors' own evaluation"
    return found if detected.image_size else _guessed(found, whose, told)


_BY_FAMILY = {"ConvNeXt": _of_convnext, "ResNet": _of_resnet, "Swin": _of_swin}


def _authors(size: int) -> Preprocessing:
    whole = size >= _WHOLE_IMAGE_FROM
    return Preprocessing(size, None if whole else int(size / _CROP_RATIO))


def _from_timm(stored: Mapping[str, Any]) -> Preprocessing:
    size = stored.get("input_size", (3, 224, 224))[-1]
    ratio, mode = stored.get("crop_pct") or _CROP_RATIO, stored.get("crop_mode") or "center"
    if mode == "border" or (mode == "squash" and ratio != 1):
        raise UserError(
            f"this model's pretrained_cfg (config.json) asks for crop_mode {mode!r} with crop_pct "
            f"{ratio}, which is not supported; edit it to 'center', or to 'squash' with 1.0"
        )
    note = ""
    if "test_input_size" in stored:
        test_size, test_ratio = stored["test_input_size"][-1], stored.get("test_crop_pct", ratio)
        note = f"timm also evaluates it at {test_size} pixels with crop ratio {test_ratio}"
    return Preprocessing(
        image_size=size,
        resize_size=None if mode == "squash" else math.floor(size / ratio),
        interpolation=stored.get("interpolation", "bicubic"),
        note=note,
        **{**_IMAGENET, **_mean_std(stored)},
    )


def _timm_default(name: str, size: int | None) -> Preprocessing:
    if "clip" in name:
        side = size or 256
        found = Preprocessing(side, None if side >= _WHOLE_IMAGE_FROM else side, **_CLIP)
        return _guessed(found, "what timm's fine-tuned CLIP models have", size)
    if "dinov3" in name:
        return Preprocessing(224, 224)
    note = "what most of timm's models have (no config.json lies beside the weights)"
    found = _authors(size or 224)
    return _guessed(found, f"{note}; it also evaluates those for 224 at 288 pixels", size)


def _from_transformers(stored: Mapping[str, Any], processor: str) -> Preprocessing:
    """What an image processor does: ConvNext's ("transformers"), DINOv3's, or ViT's for Swin."""
    size = stored.get("size", 224 if processor == "vit" else 384)
    # ViT's crops nothing.
    whole = processor == "vit"
    if isinstance(size, Mapping):
        whole = "height" in size
        side = size["height"] if whole else size["shortest_edge"]
    else:
        side = size
    ratio = stored.get("crop_pct") or _CROP_RATIO
    whole = whole or side >= _WHOLE_IMAGE_FROM
    default, default_filter = (_IMAGENET, 2) if processor == "dinov3" else (_HALF, 3)
    note = ""
    if "image_mean" not in stored and default is _HALF:
        note = "preprocessor_config.json names no image_mean, so it is transformers' default of 0.5"
    given = {"mean": stored.get("image_mean"), "std": stored.get("image_std")}
    return Preprocessing(
        image_size=side,
        resize_size=None if whole else int(side / ratio),
        interpolation=_FILTERS[stored.get("resample", default_filter)],
        note=note,
        **{**default, **_mean_std(given)},
    )


def _mean_std(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(stored[key]) for key in ("mean", "std") if stored.get(key) is not None}


def _guessed(found: Preprocessing, whose: str, size: int | None) -> Preprocessing:
    why = "which its name says" if size else "the usual one, since its name says none"
    return dataclasses.replace(
        found,
        note=f"the preprocessing is {whose}, for {found.image_size} pixels, {why}",
    )


def _telling_name(source: str) -> str:
    """The last part of a path or URL, or that before it where all files are called so."""
    *parents, name = source.rstrip("/").lower().split("/")
    generic = re.match(r"(pytorch_)?model\b|open_clip|checkpoint\b|best\b|weights\b", name)
    return parents[-1] if generic and parents else name


def _size_in(name: str) -> int | None:
    """A resolution in a file's or model's name, such as `…_384.pth`, `…-224-22k` or `.r384_…`."""
    found = re.findall(r"(?<![0-9a-z])r?(160|192|224|256|288|320|384|448|512)(?![0-9a-z])", name)
    return int(found[-1]) if found else None
