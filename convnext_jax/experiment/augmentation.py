"""What the accelerators do to a config's training images."""

from ml_collections import ConfigDict

from convnext_jax.data.augment import AugmentConfig
from convnext_jax.data.erasing import MODES, ErasingConfig
from convnext_jax.data.geometry_ops import INTERPOLATIONS
from convnext_jax.data.mixing import MixConfig
from convnext_jax.data.policies import (
    ColorJitter,
    Policy,
    PolicySequence,
    TrivialAugmentWide,
    parse_policy,
)
from convnext_jax.errors import UserError


def build_mixing(config: ConfigDict) -> MixConfig:
    """Mixup, cutmix and smoothing of a config.

    Raises:
      UserError: if a group of images under one λ does not divide the batch, or a value is out of
        range.
    """
    mixing = MixConfig(**config.mix)
    for field, high in (("prob", 1.0), ("switch_prob", 1.0), ("label_smoothing", 1.0)):
        if not 0 <= getattr(mixing, field) <= high:
            raise UserError(f"config.mix.{field} is {getattr(mixing, field)}; it must be in [0, 1]")
    mixes = mixing.prob > 0 and (mixing.mixup_alpha > 0 or mixing.cutmix_alpha > 0)
    group = min(mixing.group_size or config.batch_size, config.batch_size)
    if mixes and config.batch_size % group:
        raise UserError(
            f"config.mix.group_size = {mixing.group_size} does not divide config.batch_size = "
            f"{config.batch_size}; give a divisor, or 0 to mix the whole batch under one λ"
        )
    return mixing


def build_augmentation(config: ConfigDict) -> AugmentConfig:
    """What the accelerators do to training images before mixing.

    Raises:
      UserError: for a policy, interpolation or mode that does not exist.
    """
    fields = config.augment
    policy = parse_policy(fields.policy)
    # What geometric operations bring in: the mean colour, as timm has it; torchvision's is black.
    fill = tuple(min(255, round(255 * mean)) for mean in fields.mean)
    if isinstance(policy, TrivialAugmentWide):
        fill = (0, 0, 0)
    for name, known in (("policy_interpolation", INTERPOLATIONS), ("erasing_mode", MODES)):
        if fields[name] not in known:
            raise UserError(
                f"config.augment.{name} is {fields[name]!r}; it must be one of {', '.join(known)}"
            )
    policies: list[Policy] = [] if policy is None else [policy]
    if fields.color_jitter:
        policies.append(ColorJitter(fields.color_jitter))
    return AugmentConfig(
        policy=PolicySequence(tuple(policies)) if len(policies) > 1 else next(iter(policies), None),
        fill=fill,
        interpolation=fields.policy_interpolation,
        mean=tuple(fields.mean),
        std=tuple(fields.std),
        erasing=ErasingConfig(fields.erasing_prob, fields.erasing_mode)
        if fields.erasing_prob
        else None,
    )
