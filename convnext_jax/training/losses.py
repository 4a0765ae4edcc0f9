"""What the training step minimises, given logits and soft targets.

Smoothing and mixing sit inside the targets (`data/mixing.py`), for either loss. Evaluation's loss
is the plain cross entropy whatever a network was trained with.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

# From logits (B, K) and float32 targets (B, K) to a float32 scalar, the mean over the batch.
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def soft_target_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of the cross entropy against soft targets.

    Args:
      logits: floats (B, K).
      targets: float32 (B, K), rows of sum 1.

    Returns:
      float32 scalar.
    """
    chex.assert_equal_shape([logits, targets])
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def binary_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    target_threshold: float | None = None,
    smoothing: float = 0.0,
    sum_classes: bool = False,
) -> jax.Array:
    """Mean over the batch of K binary cross entropies, one per class (arXiv 2110.00476, section 2).

    As `BinaryCrossEntropy` of timm, whose mean goes over the classes too: gradients are K times
    smaller than those of the sum. AdamW and LAMB do not feel that factor, but for their epsilon and
    the clipping of gradients.

    Args:
      logits: floats (B, K).
      targets: float32 (B, K), in [0, 1].
      target_threshold: classes whose target is above it are trained towards 1, all others towards
        0, so that both classes of a mixed image are wholly there. None to take targets as they are.
      smoothing: s, applied behind the threshold, which undoes the smoothing of the targets: towards
        1 - s + s/K and s/K. In timm it stays undone. Not used without a threshold.
      sum_classes: add over the classes instead of averaging.

    Returns:
      float32 scalar.
    """
    chex.assert_equal_shape([logits, targets])
    if target_threshold is not None:
        present = (targets > target_threshold).astype(jnp.float32)
        targets = present * (1.0 - smoothing) + smoothing / targets.shape[-1]
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
    return losses.sum(axis=-1).mean() if sum_classes else losses.mean()
