"""Mixup and cutmix on the accelerator, with their soft targets.

The reference mixes on each GPU by itself: one λ per 128 images, each image with its mirror in
that group. A global batch of 4096 under a single λ would be another recipe (its gradient is noisier
from step to step), so the batch is cut into groups of `group_size` consecutive images. Groups that
lie within one device also keep the exchange of partners off the network, and what becomes of an
image depends on its place in the global batch, not on the number of devices. Partners are the same
where each image has a λ of its own (timm's mode "elem").
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from convnext_jax.errors import UserError


class MixConfig(NamedTuple):
    """What `mix` does; the defaults are the paper's (table 5).

    Attributes:
      mixup_alpha: λ ~ Beta(α, α); 0 turns mixup off.
      cutmix_alpha: the same for cutmix.
      prob: probability that a group is mixed at all.
      switch_prob: probability of cutmix, where both are on.
      label_smoothing: s; off-value s/K, on-value 1 - s + s/K.
      group_size: images among which partners are found, and under one λ; 0, or more than there
        are, for the whole batch.
      per_element: each image draws for itself whether and how it is mixed, and its λ.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.1
    group_size: int = 128
    per_element: bool = False


class Mixture(NamedTuple):
    """How each group, or each image, is mixed; G groups, E images of a group (1 where all alike).

    Attributes:
      lam: float32 (G, E), the weight of an image's own target.
      outside: float32 (G, E), the weight of its own pixels outside of the box: λ, or 1 for cutmix.
      rows: bool (G, E, H), the box's, of which nothing is kept; empty for mixup.
      columns: bool (G, E, W).
    """

    lam: jax.Array
    outside: jax.Array
    rows: jax.Array
    columns: jax.Array


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Soft targets of unmixed images.

    Args:
      labels: integers (B,).
      num_classes: K.
      smoothing: s, in [0, 1).

    Returns:
      float32 (B, K), rows of sum 1: 1 - s + s/K at the label, s/K elsewhere.
    """
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return one_hot * (1.0 - smoothing) + smoothing / num_classes


def cutmix_box(
    key: jax.Array, lam: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws cutmix's box and corrects λ for the part that is clipped at the border.

    The box has sides int(H √(1-λ)), int(W √(1-λ)) around a centre uniform over the pixels.

    Args:
      key: random key.
      lam: float32 scalar in [0, 1].
      height: H, in pixels.
      width: W, in pixels.

    Returns:
      Bool masks of the box's rows (H,) and columns (W,), and the corrected λ = 1 - area / (H W), a
      float32 scalar.
    """
    ratio = jnp.sqrt(1.0 - lam)
    key_y, key_x = jax.random.split(key)

    def span(key: jax.Array, size: int) -> jax.Array:
        half = jnp.floor(size * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        position = jnp.arange(size)
        return (position >= centre - half) & (position < centre + half)

    rows, columns = span(key_y, height), span(key_x, width)
    area = rows.sum().astype(jnp.float32) * columns.sum().astype(jnp.float32)
    return rows, columns, 1.0 - area / (height * width)


def draw_mixture(
    key: jax.Array, batch: int, height: int, width: int, config: MixConfig
) -> Mixture | None:
    """Draws how a batch is mixed.

    Args:
      key: random key of the step; group g draws from `fold_in(key, g)`, or, per element, image i
        from `fold_in(key, i)`.
      batch: B, images.
      height: H, in pixels.
      width: W, in pixels.
      config: what to do.

    Returns:
      The mixture, or None where nothing is to be mixed.

    Raises:
      UserError: if the group size does not divide the batch.
    """
    if config.prob == 0 or (config.mixup_alpha == 0 and config.cutmix_alpha == 0):
        return None
    group = min(config.group_size or batch, batch)
    if batch % group:
        raise UserError(
            f"config.mix.group_size = {group} does not divide the batch of {batch} images; "
            "give a divisor, or 0 to mix the whole batch under one λ"
        )

    def draw(key: jax.Array) -> Mixture:
        key_apply, key_switch, key_mixup, key_cutmix, key_box = jax.random.split(key, 5)
        if config.mixup_alpha and config.cutmix_alpha:
            use_cutmix = jax.random.bernoulli(key_switch, config.switch_prob)
        else:
            use_cutmix = jnp.bool_(config.cutmix_alpha > 0)
        apply = jax.random.bernoulli(key_apply, config.prob)
        # An α of 0 is never drawn from: its method is off.
        alpha = config.mixup_alpha or 1.0
        lam_mixup = jax.random.beta(key_mixup, alpha, alpha, dtype=jnp.float32)
        alpha = config.cutmix_alpha or 1.0
        lam_cutmix = jax.random.beta(key_cutmix, alpha, alpha, dtype=jnp.float32)
        rows, columns, lam_box = cutmix_box(key_box, lam_cutmix, height, width)
        boxed = apply & use_cutmix
        return Mixture(
            lam=jnp.where(apply, jnp.where(use_cutmix, lam_box, lam_mixup), 1.0),
            outside=jnp.where(apply & ~use_cutmix, lam_mixup, 1.0),
            rows=rows & boxed,
            columns=columns & boxed,
        )

    groups = batch // group
    elements = group if config.per_element else 1
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(groups * elements))
    mixture = jax.vmap(draw)(keys)
    return jax.tree.map(lambda x: x.reshape(groups, elements, *x.shape[1:]), mixture)


def apply_mixture(
    mixture: Mixture, images: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its mirror in its group, x_j = λ x_j + (1-λ) x_{G-1-j}.

    Args:
      mixture: from `draw_mixture`.
      images: floats (B, H, W, C), normalised.
      targets: float32 (B, K), rows of sum 1.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    groups = mixture.lam.shape[0]
    box = mixture.rows[:, :, :, None] & mixture.columns[:, :, None, :]
    own = jnp.where(box, 0.0, mixture.outside[:, :, None, None]).astype(images.dtype)[..., None]
    lam = mixture.lam[:, :, None]

    grouped = images.reshape(groups, -1, *images.shape[1:])
    mixed = grouped * own + grouped[:, ::-1] * (1 - own)
    grouped = targets.reshape(groups, -1, targets.shape[-1])
    mixed_targets = grouped * lam + grouped[:, ::-1] * (1.0 - lam)
    return mixed.reshape(images.shape), mixed_targets.reshape(targets.shape)


def mix(
    key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int, config: MixConfig
) -> tuple[jax.Array, jax.Array]:
    """Makes soft targets, draws a mixture and applies it.

    Args:
      key: random key of the step.
      images: floats (B, H, W, C), normalised.
      labels: integers (B,).
      num_classes: K.
      config: what to do.

    Returns:
      Images of the same shape and dtype, and float32 soft targets (B, K) with rows of sum 1.

    Raises:
      AssertionError: if images and labels have not these shapes.
      UserError: if the group size does not divide the batch.
    """
    chex.assert_rank(images, 4)
    chex.assert_shape(labels, (images.shape[0],))
    targets = smooth_one_hot(labels, num_classes, config.label_smoothing)
    batch, height, width, _ = images.shape
    mixture = draw_mixture(key, batch, height, width, config)
    if mixture is None:
        return images, targets
    return apply_mixture(mixture, images, targets)
