"""PyTorch's ConvNeXts under the names of every layout, with random weights that hide nothing.

Importing this needs torch and transformers; timm and torchvision only where asked for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from make_golden_models import Isotropic, official_weights, transformers
from torch import nn

NUM_CLASSES = 10

# The residual stream is kept this small, so that what the norms divide by, a variance of some 1e-4,
# shows an error in their epsilon of 1e-6. Nothing else of the network depends on the scale.
_STREAM = 1e-2
_SMALL_OUTPUT = re.compile(
    r"(pwconv2|pointwise_conv2|mlp\.fc2|block\.5)\."  # a branch's last product
    r"|(dwconv|conv_dw|depthwise_conv|block\.0)\.bias"
    r"|embeddings\.|stages\.0\.downsample_layers\.|\bstem\.|features\.0\."
    r"|(downsampling_layer|stages\.[1-3]\.downsample(_layers)?)\.1\.|features\.[246]\.1\."
)
# In V2 the first block's hidden layer is so small that GRN's epsilon shows, too.
_SMALL = 1e-5
_FIRST_BLOCK = r"stages\.0\.(layers|blocks)\.0\."
_FIRST_HIDDEN = re.compile(_FIRST_BLOCK + r"(mlp\.)?((pwconv1|fc1)\.|grn\.bias)")
_FIRST_SECOND = re.compile(_FIRST_BLOCK + r"(mlp\.)?(pwconv2|fc2)\.weight")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of PyTorch, in evaluation mode.

    Attributes:
      model: the module.
      stages: its stages, whose outputs are the feature maps.
      logits: what gives the model's result for NCHW images; None for an encoder without final norm.
      rename: its tensors by their own names → the names and shapes of the layout.
      map_norms: what normalises the stages' outputs, in a backbone.
    """

    model: nn.Module
    stages: Sequence[nn.Module]
    logits: Callable[[torch.Tensor], torch.Tensor] | None
    rename: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict
    map_norms: Sequence[nn.Module] | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights as a file of this layout has them."""
        return self.rename({k: v.detach().numpy() for k, v in self.model.state_dict().items()})

    def outputs(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Logits (B, K) and NHWC feature maps of NHWC images."""
        maps: list[torch.Tensor] = []
        hooks = [
            stage.register_forward_hook(lambda module, inputs, output: maps.append(output))
            for stage in self.stages
        ]
        nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        logits = (self.logits or self.model)(nchw)
        for hook in hooks:
            hook.remove()
        if self.map_norms is not None:
            maps = [norm(x) for norm, x in zip(self.map_norms, maps, strict=True)]
        named = {f"stage_{i}": x.permute(0, 2, 3, 1) for i, x in enumerate(maps)}
        return named if self.logits is None else {"logits": logits, **named}

    def gradients(
        self, images: np.ndarray, weight: np.ndarray
    ) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
        """`outputs`, and gradients of sum(weight · last output) as a file of this layout has them.

        The last output is the logits, or where there are none the last feature map.
        """
        self.model.zero_grad()
        outputs = self.outputs(images)
        (outputs[self.last] * torch.from_numpy(weight)).sum().backward()
        named = dict(self.model.named_parameters())
        grads = {
            k: torch.zeros_like(named[k]) if named[k].grad is None else named[k].grad
            for k in self.model.state_dict()
        }
        return outputs, self.rename({k: v.detach().numpy() for k, v in grads.items()})

    @property
    def last(self) -> str:
        """Name of the last output."""
        return f"stage_{len(self.stages) - 1}" if self.logits is None else "logits"


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draws weights far from their initial values, with which a slip anywhere shows in the output.

    γ, the norms' weights and GRN's γ lie around 1 and all biases at 0.3, kernels have variance
    1 / fan-in: every block adds to the stream about as much as any other, so that the activations
    neither grow nor fade with depth and float32's rounding stays near 1e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    grn = any("grn" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.squeeze().ndim > 1:
                value.copy_(noise / math.sqrt(value[0].numel()))
            elif re.search(r"bias$", name):
                value.copy_(0.3 * noise)
            else:
                value.copy_(1 + 0.3 * noise)
            if _SMALL_OUTPUT.search(name):
                value.mul_(_STREAM)
            if grn and _FIRST_HIDDEN.search(name):
                value.mul_(_SMALL)
            if grn and _FIRST_SECOND.search(name):
                value.div_(_SMALL)
    return model.eval()


def transformers_model(
    version: int, depths: Sequence[int], dims: Sequence[int], seed: int = 0, **config: Any
) -> Reference:
    """ConvNextForImageClassification or ConvNextV2ForImageClassification."""
    suffix = "V2" if version == 2 else ""
    made = getattr(transformers, f"ConvNext{suffix}Config")(
        depths=list(depths),
        hidden_sizes=list(dims),
        num_labels=NUM_CLASSES,
        # Their default is 1e-12, in the final norm alone; the authors' is 1e-6 there, too.
        **{"layer_norm_eps": 1e-6, **config},
    )
    model = getattr(transformers, f"ConvNext{suffix}ForImageClassification")(made)
    base = getattr(model, model.base_model_prefix)
    randomise(model, seed)
    return Reference(model, base.encoder.stages, lambda x: model(x).logits)


def transformers_bare(
    version: int, depths: Sequence[int], dims: Sequence[int], seed: int = 0
) -> Reference:
    """ConvNextModel or ConvNextV2Model, which has no head."""
    whole = transformers_model(version, depths, dims, seed)
    model = getattr(whole.model, whole.model.base_model_prefix)
    return Reference(model, whole.stages, lambda x: model(x).pooler_output)


def transformers_backbone(
    version: int, depths: Sequence[int], dims: Sequence[int], seed: int = 0
) -> Reference:
    """ConvNextBackbone or ConvNextV2Backbone, with a norm on each of the four outputs."""
    suffix = "V2" if version == 2 else ""
    config = getattr(transformers, f"ConvNext{suffix}Config")(
        depths=list(depths), hidden_sizes=list(dims), out_indices=[1, 2, 3, 4]
    )
    model = randomise(getattr(transformers, f"ConvNext{suffix}Backbone")(config), seed)
    norms = list(model.hidden_states_norms.values())
    return Reference(model, model.encoder.stages, None, map_norms=norms)


def transformers_dinov3(
    depths: Sequence[int], dims: Sequence[int], seed: int = 0, nested: bool = True
) -> Reference:
    """DINOv3ConvNextModel; `nested=False` for the names of the published files."""
    config = transformers.DINOv3ConvNextConfig(depths=list(depths), hidden_sizes=list(dims))
    model = randomise(transformers.DINOv3ConvNextModel(config), seed)

    def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors if nested else {k.removeprefix("model."): v for k, v in tensors.items()}

    return Reference(model, model.model.stages, lambda x: model(x).pooler_output, rename)


def official_model(
    version: int, depths: Sequence[int], dims: Sequence[int], seed: int = 0
) -> Reference:
    """The authors' names: transformers' model, with make_golden_models.py's renaming."""
    whole = transformers_model(version, depths, dims, seed)
    return dataclasses.replace(whole, rename=_official)


def meta_dinov3(depths: Sequence[int], dims: Sequence[int], seed: int = 0) -> Reference:
    """Meta's own DINOv3 file: the authors' names, no head, and the norm a second time."""

    def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = _official(tensors)
        norm = {f"norms.3.{k}": named[f"norm.{k}"] for k in ("weight", "bias")}
        return {**named, **norm}

    return dataclasses.replace(transformers_bare(1, depths, dims, seed), rename=rename)


def fcmae(
    depths: Sequence[int], dims: Sequence[int], seed: int = 0, sparse: bool = True
) -> Reference:
    """An encoder of the masked pre-training: no head, no final norm.

    Args:
      depths: blocks per stage.
      dims: channels per stage.
      seed: of the weights.
      sparse: as the pre-training program saves it, inside of the whole auto-encoder, rather than as
        the fine-tuning program reads it.
    """

    def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {k: v for k, v in _official(tensors).items() if not k.startswith("norm.")}
        grn = {k: v.reshape(1, -1) for k, v in named.items() if ".grn." in k}
        if not sparse:
            return {**named, **grn}
        return _sparse({**named, **grn}) | {
            "mask_token": np.zeros((1, 8, 1, 1), np.float32),
            "proj.weight": np.zeros((8, dims[-1], 1, 1), np.float32),
            "decoder.0.dwconv.weight": np.zeros((8, 1, 7, 7), np.float32),
            "pred.bias": np.zeros(3072, np.float32),
        }

    whole = transformers_bare(2, depths, dims, seed)
    return dataclasses.replace(whole, logits=None, rename=rename)


def isotropic(depth: int, dim: int, layer_scale: bool, seed: int = 0) -> Reference:
    """The authors' isotropic model."""
    model = randomise(Isotropic(depth, dim, NUM_CLASSES, float(layer_scale)), seed)
    return Reference(model, [model.blocks[-1]], lambda x: model(x)[0], _official)


def torchvision_model(depths: Sequence[int], dims: Sequence[int], seed: int = 0) -> Reference:
    """torchvision's ConvNeXt."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [
        CNBlockConfig(dim, following, depth)
        for dim, following, depth in zip(dims, [*dims[1:], None], depths, strict=True)
    ]
    model = randomise(ConvNeXt(settings, num_classes=NUM_CLASSES), seed)
    return Reference(model, [model.features[i] for i in (1, 3, 5, 7)], model)


def timm_model(
    name: str, seed: int = 0, rename: Callable[..., Any] = dict, **arguments: Any
) -> Reference:
    """timm's model of this name; `arguments` such as `depths` replace its own."""
    import timm

    model = timm.create_model(name, **{"num_classes": NUM_CLASSES, **arguments})
    randomise(model, seed)
    return Reference(model, model.stages, model, rename)


def clip_trunk(name: str, seed: int = 0, **arguments: Any) -> Reference:
    """timm's model as the image tower in a file of open_clip."""

    def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        trunk = {f"visual.trunk.{k}": v for k, v in tensors.items()}
        others = ("visual.head.proj.weight", "token_embedding.weight", "text_projection")
        beside = {k: np.zeros((8, 8), np.float32) for k in others}
        beside["transformer.resblocks.0.mlp.c_fc.weight"] = np.zeros((8, 8), np.float32)
        return {**trunk, **beside, "logit_scale": np.zeros((), np.float32)}

    return timm_model(name, seed, rename, num_classes=0, **arguments)


def _official(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return official_weights({k: torch.from_numpy(v) for k, v in tensors.items()})


def _sparse(dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' `remap_checkpoint_keys`, backwards."""
    tensors = {}
    for name, value in dense.items():
        module, leaf = name.rsplit(".", 1)
        in_stem = module.startswith("downsample_layers.0.")
        if value.ndim == 4 and not in_stem:
            out, into, height, width = value.shape
            by_column = value.transpose(3, 2, 1, 0).reshape(width * height, into, out)
            tensors[f"encoder.{module}.kernel"] = by_column[:, 0] if into == 1 else by_column
        elif re.search(r"norm$|downsample_layers\.[123]\.0$", module):
            tensors[f"encoder.{module}.ln.{leaf}"] = value
        elif "pwconv" in module:
            tensors[f"encoder.{module}.linear.{leaf}"] = value
        elif leaf == "bias" and not in_stem:
            tensors[f"encoder.{name}"] = value.reshape(1, -1)
        else:
            tensors[f"encoder.{name}"] = value
    return tensors
