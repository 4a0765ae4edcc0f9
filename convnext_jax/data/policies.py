"""What is drawn for each image: RandAugment, TrivialAugmentWide, 3-Augment and colour jitter.

A policy is a law: it draws, for one image, a list of operations and their arguments, and touches no
pixel. Names and argument maps are those of the implementations that published results come from:
RandAugment (arXiv 1909.13719) as in timm, with its notation, "rand-m9-mstd0.5-inc1";
TrivialAugmentWide (arXiv 2103.10158) as in torchvision; 3-Augment (DeiT III, arXiv 2204.07118,
section 3.2) and colour jitter as in the authors' code.
"""

import re
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.data.color_ops import round_factor
from convnext_jax.errors import UserError

# Magnitudes of RandAugment run from 0 to this.
_MAX_MAGNITUDE = 10.0
# A larger standard deviation means, in timm's notation, a magnitude uniform in [0, m].
_UNIFORM_FROM = 100.0


class Policy(Protocol):
    """A law of operations.

    Attributes:
      names: the operations that can come up, keys of `operations.OPERATIONS`.
      length: K, how many are drawn for an image.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def length(self) -> int: ...  # noqa: D102

    def draw(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Draws one image's operations.

        Args:
          key: the image's own random key.
          height: of the image, in pixels.
          width: of the image, in pixels.

        Returns:
          int32 (K,), indices into `names`, and float32 (K,), the arguments.
        """
        ...


class RandAugment(NamedTuple):
    """N operations drawn uniformly with replacement, each skipped with a probability.

    Attributes:
      magnitude: m, in [0, 10].
      magnitude_std: of the normal noise added to m, clipped to [0, 10]; above 100, m is uniform in
        [0, magnitude] instead.
      length: N.
      prob: that a drawn operation is applied.
      increasing: whether every operation's effect grows with m (timm's "inc1"); otherwise
        Posterize and Solarize grow weaker, and the blends go from .1 to 1.9.
    """

    magnitude: float = 10.0
    magnitude_std: float = 0.0
    length: int = 2
    prob: float = 0.5
    increasing: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Timm's fifteen, after the one for what is skipped."""
        return (
            "Identity", "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize",
            "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY",
            "TranslateX", "TranslateY",
        )  # fmt: skip

    def argument(
        self, name: str, magnitude: jax.Array, sign: jax.Array, height: int, width: int
    ) -> jax.Array:
        """An operation's argument.

        Args:
          name: of the operation.
          magnitude: float32, in [0, 10].
          sign: float32, 1 or -1, for the operations that go both ways.
          height: of the image, in pixels.
          width: of the image, in pixels.

        Returns:
          float32 of the magnitude's shape.
        """
        match name:
            case "Rotate":
                return sign * magnitude * 3.0
            case "ShearX" | "ShearY":
                return sign * magnitude * 0.03
            case "TranslateX":
                return sign * magnitude * (0.045 * width)
            case "TranslateY":
                return sign * magnitude * (0.045 * height)
            case "Posterize":
                bits = jnp.floor(magnitude * 0.4)
                return 4.0 - bits if self.increasing else bits
            case "Solarize":
                level = jnp.floor(magnitude * 25.6)
                return 256.0 - level if self.increasing else level
            case "SolarizeAdd":
                return jnp.floor(magnitude * 11.0)
            case "Color" | "Contrast" | "Brightness" | "Sharpness":
                if self.increasing:
                    return round_factor(1.0 + sign * magnitude * 0.09)
                return round_factor(0.1 + magnitude * 0.18)
            case _:
                return jnp.zeros_like(magnitude)

    def draw(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """See `Policy.draw`."""
        key_name, key_skip, key_magnitude, key_sign = jax.random.split(key, 4)
        shape = (self.length,)
        drawn = jax.random.randint(key_name, shape, 1, len(self.names))
        applied = jax.random.bernoulli(key_skip, self.prob, shape)
        if self.magnitude_std > _UNIFORM_FROM:
            magnitude = jax.random.uniform(key_magnitude, shape, maxval=self.magnitude)
        else:
            noise = self.magnitude_std * jax.random.normal(key_magnitude, shape)
            magnitude = jnp.clip(self.magnitude + noise, 0.0, _MAX_MAGNITUDE)
        sign = _signs(key_sign, shape)
        arguments = jnp.stack(
            [self.argument(name, magnitude, sign, height, width) for name in self.names]
        )
        drawn = jnp.where(applied, drawn, 0)
        return drawn, jnp.take_along_axis(arguments, drawn[None], axis=0)[0]


class TrivialAugmentWide(NamedTuple):
    """One operation, drawn uniformly, with a strength drawn uniformly from 31."""

    bins: int = 31

    @property
    def names(self) -> tuple[str, ...]:
        """Torchvision's fourteen."""
        return (
            "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
            "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
        )  # fmt: skip

    @property
    def length(self) -> int:
        """One."""
        return 1

    def arguments(self) -> tuple[np.ndarray, np.ndarray]:
        """The strengths, float32 (operations, bins), and whether an operation goes both ways."""
        steps = np.linspace(0.0, 1.0, self.bins)
        strengths = {
            "ShearX": 0.99 * steps,
            "ShearY": 0.99 * steps,
            "TranslateX": np.trunc(32.0 * steps),
            "TranslateY": np.trunc(32.0 * steps),
            "Rotate": 135.0 * steps,
            "Brightness": 0.99 * steps,
            "Color": 0.99 * steps,
            "Contrast": 0.99 * steps,
            "Sharpness": 0.99 * steps,
            "Posterize": 8.0 - np.round(6.0 * steps),
            "Solarize": 255.0 * (1.0 - steps),
        }
        rows = [strengths.get(name, np.zeros(self.bins)) for name in self.names]
        signed = [
            name in strengths and name not in ("Posterize", "Solarize") for name in self.names
        ]
        return np.asarray(rows, np.float32), np.asarray(signed)

    def draw(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """See `Policy.draw`."""
        key_name, key_bin, key_sign = jax.random.split(key, 3)
        drawn = jax.random.randint(key_name, (1,), 0, len(self.names))
        strength = jax.random.randint(key_bin, (1,), 0, self.bins)
        strengths, signed = (jnp.asarray(x) for x in self.arguments())
        argument = strengths[drawn, strength]
        argument = jnp.where(signed[drawn], _signs(key_sign, (1,)) * argument, argument)
        blends = np.isin(self.names, ("Brightness", "Color", "Contrast", "Sharpness"))
        return drawn, jnp.where(jnp.asarray(blends)[drawn], round_factor(1.0 + argument), argument)


class ThreeAugment(NamedTuple):
    """One of grey, solarised from 128 on, or blurred with a sigma uniform in [.1, 2] pixels."""

    @property
    def names(self) -> tuple[str, ...]:
        """DeiT III's three."""
        return ("Grayscale", "Solarize", "GaussianBlur")

    @property
    def length(self) -> int:
        """One."""
        return 1

    def draw(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """See `Policy.draw`."""
        key_name, key_sigma = jax.random.split(key)
        drawn = jax.random.randint(key_name, (1,), 0, 3)
        sigma = jax.random.uniform(key_sigma, (1,), minval=0.1, maxval=2.0)
        return drawn, jnp.where(drawn == 1, 128.0, sigma)


class ColorJitter(NamedTuple):
    """Brightness, contrast and saturation by factors uniform in [1 - s, 1 + s], in random order.

    Attributes:
      strength: s, in (0, 2].
    """

    strength: float

    @property
    def names(self) -> tuple[str, ...]:
        """The three."""
        return ("Brightness", "Contrast", "Color")

    @property
    def length(self) -> int:
        """Three."""
        return 3

    def draw(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """See `Policy.draw`."""
        key_order, key_factor = jax.random.split(key)
        low, high = max(0.0, 1.0 - self.strength), 1.0 + self.strength
        factors = jax.random.uniform(key_factor, (3,), minval=low, maxval=high)
        return jax.random.permutation(key_order, 3), round_factor(factors)


class PolicySequence(NamedTuple):
    """One policy after another."""

    policies: tuple[Policy, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all, each once."""
        return tuple(dict.fromkeys(name for policy in self.policies for name in policy.names))

    @property
    def length(self) -> int:
        """Of all together."""
        return sum(policy.length for policy in self.policies)

    def draw(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """See `Policy.draw`."""
        operations, arguments = [], []
        for i, policy in enumerate(self.policies):
            drawn, argument = policy.draw(jax.random.fold_in(key, i), height, width)
            places = jnp.asarray([self.names.index(name) for name in policy.names], jnp.int32)
            operations.append(places[drawn])
            arguments.append(argument)
        return jnp.concatenate(operations), jnp.concatenate(arguments)


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, shape), 1.0, -1.0)


def parse_policy(text: str) -> Policy | None:
    """Reads a policy's notation.

    Args:
      text: "rand-…" in timm's notation, with the parts m (magnitude, 10 where not given), n (number
        of operations, 2), p (probability that one is applied, .5), mstd (standard deviation of the
        magnitude, 0) and inc (0 or 1, 0); "ta_wide"; "3-augment"; or "" for none.

    Returns:
      The policy, or None.

    Raises:
      UserError: for another policy, or a part that is unknown, malformed or out of range.
    """
    if text in ("", "ta_wide", "3-augment"):
        return {"": None, "ta_wide": TrivialAugmentWide(), "3-augment": ThreeAugment()}[text]
    kind, *parts = text.split("-")
    if kind != "rand":
        raise UserError(
            f"config.augment.policy is {text!r}; it must be RandAugment in timm's notation, such "
            'as "rand-m9-mstd0.5-inc1", or "ta_wide", "3-augment", or "" for none'
        )
    values: dict[str, float] = {}
    ranges = {
        "m": (0, _MAX_MAGNITUDE),
        "n": (1, 16),
        "p": (0, 1),
        "mstd": (0, float("inf")),
        "inc": (0, 1),
    }
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d*)?|\.\d+)", part)
        if match is None or match[1] not in ranges:
            raise UserError(
                f"config.augment.policy {text!r}: the part {part!r} is unknown; RandAugment's are "
                "m, n, p, mstd and inc, each followed by a number"
            )
        name, value = match[1], float(match[2])
        low, high = ranges[name]
        if name in values:
            raise UserError(f"config.augment.policy {text!r}: {name} is given twice")
        whole = name in ("n", "inc")
        if not low <= value <= high or (whole and value != int(value)):
            raise UserError(
                f"config.augment.policy {text!r}: {part!r} is out of range; {name} must be "
                + ("a whole number " if whole else "")
                + (f"of {low} or more" if high == float("inf") else f"in [{low:g}, {high:g}]")
            )
        values[name] = value
    return RandAugment(
        magnitude=values.get("m", _MAX_MAGNITUDE),
        magnitude_std=values.get("mstd", 0.0),
        length=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        increasing=bool(values.get("inc", 0)),
    )
