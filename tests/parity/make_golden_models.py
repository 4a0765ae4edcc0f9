"""Writes golden/models.npz: PyTorch's ConvNeXt V1, V2 and isotropic with random weights.

Needs torch and transformers, and no network: `python tests/parity/make_golden_models.py`.
The file holds, per model, the weights under the names of the official checkpoints (`v1/weights/…`),
and for the common `images` (uint8, NHWC; the models see x / 127.5 − 1) the logits and the stage
outputs in NHWC. The comparison with Flax needs none of this: it reads the file.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torchvision_operators import define_missing_operators

define_missing_operators()

import transformers  # noqa: E402
from transformers.models.convnext.modeling_convnext import ConvNextLayer  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models.npz"

# transformers' names -> official names. A stage's downsampling is `downsample_layers` there.
_OFFICIAL = [
    (r"^convnext(v2)?\.", ""),
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    (r"\.layernorm\.", ".norm."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


class Isotropic(nn.Module):
    """Isotropic ConvNeXt of transformers' blocks, which has no such model itself."""

    def __init__(self, depth: int, dim: int, num_classes: int, layer_scale_init: float):
        super().__init__()
        config = transformers.ConvNextConfig(layer_scale_init_value=layer_scale_init)
        self.stem = nn.Conv2d(3, dim, kernel_size=16, stride=16)
        self.blocks = nn.ModuleList(ConvNextLayer(config, dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean((2, 3)))), [x]


class Staged(nn.Module):
    """transformers' V1 or V2 classifier, with the stage outputs beside the logits."""

    def __init__(
        self,
        version: int,
        depths: list[int],
        dims: list[int],
        num_classes: int,
        **arguments: object,
    ):
        super().__init__()
        suffix = "V2" if version == 2 else ""
        config = getattr(transformers, f"ConvNext{suffix}Config")(
            depths=depths,
            hidden_sizes=dims,
            num_labels=num_classes,
            # Their default is 1e-12; the reference has 1e-6 in this place too.
            layer_norm_eps=1e-6,
            **arguments,
        )
        self.model = getattr(transformers, f"ConvNext{suffix}ForImageClassification")(config)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        base = getattr(self.model, self.model.base_model_prefix)
        maps: list[torch.Tensor] = []
        hooks = [
            stage.register_forward_hook(lambda module, inputs, output: maps.append(output))
            for stage in base.encoder.stages
        ]
        logits = self.model(images).logits
        for hook in hooks:
            hook.remove()
        return logits, maps


def build(
    version: int | str, depths: list[int], dims: list[int], seed: int, layer_scale: bool = True
) -> nn.Module:
    """Makes a model in evaluation mode whose random weights let every detail show in the output.

    Args:
      version: 1, 2 or "iso".
      depths: blocks per stage; one entry for "iso".
      dims: channels per stage.
      seed: of the weights.
      layer_scale: whether V1 and isotropic have γ.

    Returns:
      A module that maps NCHW images to (logits of 5 classes, stage outputs in NCHW).
    """
    scale = {"layer_scale_init_value": 1.0 if layer_scale else 0.0}
    if version == "iso":
        model: nn.Module = Isotropic(depths[0], dims[0], 5, scale["layer_scale_init_value"])
    else:
        model = Staged(int(version), depths, dims, 5, **(scale if version == 1 else {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.squeeze().ndim > 1:  # kernels, with variance 1 / fan-in
                value.copy_(noise / value[0].numel() ** 0.5)
            elif re.search(r"norm\.weight|layer_scale|downsampling_layer\.0\.w", name):
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_(0.3 * noise)
            # Where a norm divides by something near its epsilon, a wrong epsilon shows; GRN's
            # sees the hidden layer, whose second product then makes up for the scale.
            for pattern, factor in (
                (r"patch_embeddings|stem\.", 1e-3),
                (r"(stages\.[123]|blocks)\..*dwconv|stages\.0\..*dwconv\.bias", 1e-3),
                (r"embeddings\.layernorm|stages\.0\.layers\.\d\.pwconv2", 3e-3),
                (r"stages\.2\.layers\.0\.pwconv1", 1e-3 if version == 2 else 1.0),
                (r"stages\.2\.layers\.0\.grn.bias", 1e-3 if version == 2 else 1.0),
                (r"stages\.2\.layers\.0\.pwconv2\.weight", 1e3 if version == 2 else 1.0),
                (r"stages\.3\.downsampling_layer\.1|stages\.3\.layers\.\d\.pwconv2", 3e-3),
            ):
                if re.search(pattern, name):
                    value.mul_(factor)
    return model.eval()


def official_weights(state_dict: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A model's weights under the names of the official checkpoints."""
    weights = {}
    for name, value in state_dict.items():
        name = name.removeprefix("model.")
        for pattern, replacement in _OFFICIAL:
            name = re.sub(pattern, replacement, name)
        weights[name] = value.numpy()
    return weights


def evaluate(model: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """Logits and NHWC stage outputs for float32 NHWC images."""
    with torch.no_grad():
        logits, maps = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    outputs = {"logits": logits.numpy()}
    for i, features in enumerate(maps):
        outputs[f"stage_{i}"] = features.permute(0, 2, 3, 1).numpy()
    return outputs


def main() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 45, 70, 3), dtype=np.uint8)
    images = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    arrays: dict[str, np.ndarray] = {"images": pixels}
    for label, model in (
        ("v1", build(1, [1, 1, 2, 1], [6, 8, 10, 12], seed=1)),
        ("v2", build(2, [1, 1, 2, 1], [6, 8, 10, 12], seed=2)),
        ("iso", build("iso", [2], [8], seed=3, layer_scale=False)),
    ):
        arrays |= {
            f"{label}/weights/{k}": v for k, v in official_weights(model.state_dict()).items()
        }
        arrays |= {f"{label}/outputs/{k}": v for k, v in evaluate(model, images).items()}
    np.savez(GOLDEN, allow_pickle=False, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
