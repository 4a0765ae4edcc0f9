"""ConvNeXt V1 and V2 in PyTorch, under the authors' names, for training beside our own.

Written from the papers (arXiv 2201.03545, 2301.00808): plain torch modules, NCHW outside and NHWC
inside of the blocks. Stochastic depth is given its decisions, so that two programs can share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation of (B, H, W, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class Block(nn.Module):
    """The residual block; V2's where `use_grn`."""

    def __init__(self, channels: int, drop_rate: float, layer_scale: float, use_grn: bool):
        super().__init__()
        self.drop_rate = drop_rate
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.activation = nn.GELU()
        if use_grn:
            self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        if layer_scale:
            self.gamma = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.activation(self.pwconv1(y))
        if hasattr(self, "grn"):
            y = self.grn(y)
        y = self.pwconv2(y)
        if hasattr(self, "gamma"):
            y = self.gamma * y
        y = y.permute(0, 3, 1, 2)
        if kept is not None:
            y = y.div(1 - self.drop_rate) * kept.to(y.dtype).reshape(-1, 1, 1, 1)
        return x + y


class ConvNeXt(nn.Module):
    """A classifier of NCHW images, initialised as the authors do.

    Args:
      num_classes: width of the head.
      depths: blocks per stage.
      dims: channels per stage.
      patch_size: kernel and stride of the stem.
      drop_path_rate: stochastic depth rate of the last block.
      layer_scale: initial γ; 0 for none.
      use_grn: V2's blocks.
      head_init_scale: factor on the head's initial values.
    """

    def __init__(
        self,
        num_classes: int,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        patch_size: int = 4,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
        use_grn: bool = False,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        stem = nn.Sequential(
            nn.Conv2d(3, dims[0], kernel_size=patch_size, stride=patch_size),
            ChannelNorm(dims[0], eps=1e-6),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, behind in itertools.pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(
                    ChannelNorm(before, eps=1e-6),
                    nn.Conv2d(before, behind, kernel_size=2, stride=2),
                )
            )
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, next(rates), layer_scale, use_grn) for _ in range(depth))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
            self.head.bias.mul_(head_init_scale)

    def forward(
        self, images: torch.Tensor, kept: Sequence[torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        """Classifies.

        Args:
          images: (B, 3, H, W).
          kept: for each block which samples keep its branch, bool (B,), or None where all do; None
            without stochastic depth.

        Returns:
          Logits (B, num_classes).
        """
        blocks = iter(kept if kept is not None else [None] * sum(len(s) for s in self.stages))
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            for block in stage:
                x = block(x, next(blocks))
        return self.head(self.norm(x.mean(dim=(2, 3))))
