"""How far a measured proportion may lie from the true one."""

import math

# The standard normal's quantile that leaves 2.5 % on either side.
_Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int, z: float = _Z_95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion.

    Unlike p ± z √(p (1 - p) / n) it stays within [0, 1] and keeps its coverage where p is near 0
    or 1 (Wilson 1927; Brown, Cai and DasGupta 2001).

    Args:
      successes: how many of the trials.
      trials: n, at least 1.
      z: quantile of the standard normal; 95 % by default.

    Returns:
      The lower and the upper limit.
    """
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    # Rounding must not carry a limit past the proportion itself.
    return max(min(centre - half, p), 0.0), min(max(centre + half, p), 1.0)
