"""ResNet in the files of others."""

from __future__ import annotations

import re

from convnext_jax.convert.families.family import Family, Seen, Told, most_common, width_of
from convnext_jax.convert.layouts import resnet
from convnext_jax.errors import UserError
from convnext_jax.models.roadmap import ModernizedResNet


def _read(seen: Seen) -> Told:
    _refuse_unsupported(seen)
    shapes = seen.shapes()
    # Stage i is width · 2^i wide inside, and four times as wide at its end.
    votes = []
    for path, shape in shapes.items():
        norm = re.fullmatch(r"stages_(\d+)/blocks_\d+/(norm[123])/\w+", path)
        if norm:
            factor = 2 ** int(norm[1]) * (4 if norm[2] == "norm3" else 1)
            votes.append(shape[-1] // factor)
    return Told(
        {
            "num_classes": width_of(shapes, "head") or 0,
            "depths": seen.depths(),
            "width": most_common(votes) or width_of(shapes, "stem/conv") or 64,
        }
    )


def _refuse_unsupported(seen: Seen) -> None:
    names = [name.removeprefix(seen.prefix) for name in seen.tensors]
    by_path = {path: seen.tensors[name] for name, (path, _) in seen.match.found.items()}
    blocks = sorted(re.findall(r"(stages_\d+/blocks_\d+)/conv/kernel", "\n".join(by_path)))
    last = [path for path in by_path if re.search(r"/blocks_\d+/pwconv2/kernel$", path)]
    kind = None
    architecture = seen.config.get("architecture", "resnet50")
    if not re.fullmatch(r"(\w+_)?resnet\d+", architecture):
        # Such as resnetaa50, whose pooling has no tensors to be told by.
        kind = f"timm's {architecture} (config.json)"
    elif not any(path.endswith("/mean") for path in by_path):
        kind = "a ResNet with other norms than batch norms (resnet50_gn)"
    elif blocks and not last:
        kind = "a ResNet of basic blocks (resnet18, resnet34)"
    elif any(name.startswith("conv1.0.") for name in names):
        kind = "a ResNet whose stem has three convolutions (resnet*d, *s, *t)"
    elif any(re.match(r"layer\d\.\d+\.se\.", name) for name in names):
        kind = "a ResNet with squeeze and excitation (seresnet*, resnetrs*)"
    elif any(re.match(r"layer\d\.0\.downsample\.2\.", name) for name in names):
        kind = "a ResNet that averages in its shortcuts (resnet*d, *t)"
    else:
        grouped = most_common(
            by_path[f"{block}/conv/kernel"].shape[0] // by_path[f"{block}/conv/kernel"].shape[1]
            for block in blocks
            if by_path[f"{block}/conv/kernel"].ndim == 4
        )
        first, third = "pwconv1/kernel", "pwconv2/kernel"
        wide = most_common(
            4 * by_path[f"{block}/{first}"].shape[0] // by_path[f"{block}/{third}"].shape[0]
            for block in blocks
            if f"{block}/{first}" in by_path and f"{block}/{third}" in by_path
        )
        if grouped is not None and grouped > 1:
            kind = "a ResNeXt, whose convolutions have groups"
        elif wide is not None and wide > 1:
            kind = "a Wide ResNet"
    if kind is not None:
        raise UserError(
            f"this is {kind}, for which there is no module here; take one with ordinary "
            "bottlenecks, such as torchvision's resnet50"
        )


_CHOICES = (
    "depths",
    "width",
    "patchify_stem",
    "spatial_conv",
    "inverted_bottleneck",
    "spatial_first",
    "kernel_size",
    "activation",
    "num_activations",
    "norm_type",
    "num_norms",
    "conv_bias",
    "separate_downsampling",
    "layer_scale_init",
)

RESNET = Family(
    name="ResNet",
    network=ModernizedResNet,
    architecture=("num_classes", *_CHOICES),
    variant=_CHOICES,
    layouts=(resnet.TORCHVISION,),
    # timm's names are the same.
    ways_back={"torchvision": (resnet.TORCHVISION,), "timm": (resnet.TORCHVISION,)},
    hallmark=r"/blocks_\d+/conv/",
    read=_read,
    first_block_differs=True,
)
