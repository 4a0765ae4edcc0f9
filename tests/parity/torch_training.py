"""The paper's training in PyTorch, step by step, to hold our own against.

Written from the recipe's facts: `torch.optim.AdamW` over parameter groups, a learning rate per step
and layer, soft-target cross entropy, micro-batches, and an average of the weights after each step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Kept = Sequence[np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a training.

    Attributes:
      learning_rate: the peak.
      min_learning_rate: what the cosine falls towards.
      warmup_steps: of `total_steps`.
      total_steps: of the whole run.
      weight_decay: λ, of matrices and kernels alone.
      betas: decay of AdamW's moments.
      eps: of AdamW.
      layer_decay: ratio of learning rates between neighbouring layers; 1 for none.
      ema_decay: of the weights' average; None for none.
      accumulation_steps: micro-batches of a step.
    """

    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    total_steps: int
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0
    ema_decay: float | None = None
    accumulation_steps: int = 1


def schedule(recipe: Recipe) -> np.ndarray:
    """The learning rate of every step, float64."""
    warmup, rest = recipe.warmup_steps, recipe.total_steps - recipe.warmup_steps
    low, high = recipe.min_learning_rate, recipe.learning_rate
    cosine = low + 0.5 * (high - low) * (1 + np.cos(np.pi * np.arange(rest) / rest))
    return np.concatenate([np.linspace(0, high, warmup), cosine])


def layer_id(name: str) -> int:
    """The layer of a tensor, of 0 to 13, by its name in the authors' files."""
    numbers = [int(n) for n in re.findall(r"\.(\d+)", name)[:2]]
    if name.startswith("downsample_layers."):
        return (0, 2, 3, 12)[numbers[0]]
    if name.startswith("stages."):
        stage, block = numbers
        return 3 + block // 3 if stage == 2 else (1, 2, -1, 12)[stage]
    return 13


def is_decayed(name: str, value: torch.Tensor) -> bool:
    """Whether weight decay applies: not to vectors; V2 stores those of GRN in four dimensions."""
    return value.ndim > 1 and not name.endswith((".gamma", ".beta"))


class Training:
    """A model in training.

    Args:
      model: of the authors' names; its type, float32 or float64, is that of all arithmetic.
      recipe: the numbers.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.model, self.recipe = model.train(), recipe
        self.rates = schedule(recipe)
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, value in model.named_parameters():
            groups.setdefault((layer_id(name), is_decayed(name, value)), []).append(value)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": values,
                    "weight_decay": recipe.weight_decay if decayed else 0.0,
                    "scale": recipe.layer_decay ** (13 - layer),
                }
                for (layer, decayed), values in groups.items()
            ],
            betas=recipe.betas,
            eps=recipe.eps,
        )
        self.average = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.steps = 0

    def step(self, images: np.ndarray, targets: np.ndarray, kept: Sequence[Kept] | None) -> float:
        """Trains on one batch.

        Args:
          images: NHWC floats.
          targets: soft targets (B, K).
          kept: for each micro-batch the decisions of stochastic depth; None without.

        Returns:
          The loss before the step.
        """
        count = self.recipe.accumulation_steps
        dtype = next(self.model.parameters()).dtype
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)
        wanted = torch.from_numpy(targets.copy()).to(dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.steps] * group["scale"]
        self.optimizer.zero_grad()
        total = 0.0
        for i in range(count):
            decisions = None
            if kept is not None:
                decisions = [None if k is None else torch.from_numpy(k.copy()) for k in kept[i]]
            # Row r belongs to micro-batch r mod count.
            logits = self.model(pixels[i::count], decisions)
            loss = -(wanted[i::count] * F.log_softmax(logits, dim=-1)).sum(-1).mean() / count
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        if self.recipe.ema_decay is not None:
            decay = self.recipe.ema_decay
            with torch.no_grad():
                for name, value in self.model.named_parameters():
                    self.average[name].mul_(decay).add_(value, alpha=1 - decay)
        self.steps += 1
        return total

    def tensors(self) -> dict[str, dict[str, np.ndarray]]:
        """By kind, "parameters", "average", "first moment", "second moment": the named arrays."""
        named = dict(self.model.named_parameters())
        state = self.optimizer.state

        def arrays(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
            return {name: value.detach().numpy().copy() for name, value in values.items()}

        kinds = {
            "parameters": arrays(named),
            "first moment": arrays({k: state[v]["exp_avg"] for k, v in named.items()}),
            "second moment": arrays({k: state[v]["exp_avg_sq"] for k, v in named.items()}),
        }
        return kinds | ({} if self.recipe.ema_decay is None else {"average": arrays(self.average)})
