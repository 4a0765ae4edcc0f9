"""Writes golden/layouts.npz: a tiny model in every layout, and what PyTorch makes of an image.

Needs torch, transformers, timm and torchvision, and no network:
`python tests/parity/make_golden_layouts.py`. tests/golden_layouts.py reads the file.

Per label it holds `…/names` (name and shape of each tensor, one a line), `…/weights` (all tensors
one after the other, in C order, as the upper halves of float32: the weights are numbers that
bfloat16 has) and `…/outputs/…`, float32. The common `image` is uint8; the models see
image / 127.5 − 1.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
import torch_models as reference

GOLDEN = pathlib.Path(__file__).parent / "golden" / "layouts.npz"
DEPTHS, DIMS = (1, 2, 1, 1), (4, 5, 6, 8)
TINY = {"depths": DEPTHS, "dims": DIMS}


def references() -> dict[str, reference.Reference]:
    """Label → model. A label begins with the layout's name here."""
    made = {
        "official": reference.official_model(1, DEPTHS, DIMS),
        "official, V2": reference.official_model(2, DEPTHS, DIMS),
        "official, DINOv3 of Meta": reference.meta_dinov3(DEPTHS, DIMS),
        "official isotropic": reference.isotropic(2, 8, layer_scale=True),
        "FCMAE dense": reference.fcmae(DEPTHS, DIMS, sparse=False),
        "FCMAE sparse": reference.fcmae(DEPTHS, DIMS, sparse=True),
        "timm": reference.timm_model("convnext_tiny", **TINY),
        "timm, V2": reference.timm_model("convnextv2_tiny", **TINY),
        "timm, hidden layer": reference.timm_model(
            "convnext_large_mlp", head_hidden_size=12, **TINY
        ),
        "timm conv_mlp": reference.timm_model("convnext_atto", **TINY),
        "timm conv_mlp, V2": reference.timm_model("convnextv2_atto", **TINY),
        "timm hnf": reference.timm_model("convnext_tiny", head_norm_first=True, **TINY),
        "timm hnf conv_mlp": reference.timm_model("convnext_tiny_hnf", **TINY),
        "CLIP": reference.clip_trunk("convnext_base", **TINY),
        "torchvision": reference.torchvision_model(DEPTHS, DIMS),
        "transformers": reference.transformers_model(1, DEPTHS, DIMS),
        "transformers V2": reference.transformers_model(2, DEPTHS, DIMS),
        "transformers without head": reference.transformers_bare(1, DEPTHS, DIMS),
        "transformers without head, V2": reference.transformers_bare(2, DEPTHS, DIMS),
        "transformers without head, backbone": reference.transformers_backbone(2, DEPTHS, DIMS),
        "transformers DINOv3": reference.transformers_dinov3(DEPTHS, DIMS, nested=False),
        "transformers DINOv3, nested": reference.transformers_dinov3(DEPTHS, DIMS),
    }
    for model in made.values():
        _round_to_bfloat16(model.model)
    return made


def _round_to_bfloat16(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.bfloat16().float())


def main() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 47, 33, 3), dtype=np.uint8)
    images = image.astype(np.float32) / np.float32(127.5) - np.float32(1)
    arrays: dict[str, np.ndarray] = {"image": image}
    for label, model in references().items():
        tensors = model.tensors()
        arrays[f"{label}/names"] = np.array(
            [f"{name} {','.join(map(str, value.shape))}" for name, value in tensors.items()]
        )
        flat = np.concatenate([value.ravel() for value in tensors.values()])
        arrays[f"{label}/weights"] = (flat.view(np.uint32) >> 16).astype(np.uint16)
        with torch.no_grad():
            outputs = model.outputs(images)
        arrays |= {f"{label}/outputs/{name}": value.numpy() for name, value in outputs.items()}
    np.savez_compressed(GOLDEN, allow_pickle=False, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
