"""A step of the road from ResNet to ConvNeXt, on ImageNet-1K at 224 pixels, from scratch.

    python -m convnext_jax.train --config configs/roadmap.py:t/07_dw_first \
        --workdir runs/roadmap_t_07

`python -m convnext_jax.roadmap` lists the steps; the road t leads from ResNet-50 to ConvNeXt-T, b
from ResNet-200 to ConvNeXt-B. The first step, 00_resnet, has ResNet's own recipe (90 epochs, batch
256), all others the modern one (300 epochs, batch 4096).

Meant for a TPU slice of 64 chips (64 images a chip), and of 8 for the first step (32 images a
chip). Expected top-1: what tables 10 and 11 of the paper give for the step, from 76.1 % to 82.0 %
on the road t and from 78.2 % to 83.6 % on b; the paper's figures of t are means of three runs.
"""

from ml_collections import ConfigDict

from convnext_jax import comparison_recipes


def get_config(step: str = "") -> ConfigDict:
    """Paper, appendix A.1; `step`, such as "t/07_dw_first", is what follows the colon."""
    return comparison_recipes.roadmap(step)
