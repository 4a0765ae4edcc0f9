"""What the TPU chips can do, by their data sheets: the one table that estimates are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """A type of chip; all figures are of one chip, whatever it consists of.

    Attributes:
      name: as topologies are named by it, "v5e".
      peak_flops: bfloat16 FLOP/s of the matrix units, a product and its sum being two.
      flops_per_cycle: of the same: matrix units × side² × 2.
      hbm_bytes: memory.
      usable_hbm_bytes: what libtpu's compiler lets a program have of it.
      hbm_bandwidth: bytes/s between chip and memory.
      ici_bandwidth: bytes/s that a chip can send to its neighbours over all its links.
      dimensions: of the torus that its slices are cut from, 2 or 3.
      chips_per_host: of slices that span several hosts.
      config: libtpu's name for how the chip's cores appear; "megacore": two as one device.
    """

    name: str
    peak_flops: float
    flops_per_cycle: int
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int
    chips_per_host: int = 4
    config: str = "default"

    @property
    def clock(self) -> float:
        """Cycles/s at which the matrix units reach their peak."""
        return self.peak_flops / self.flops_per_cycle


# Peak, memory, bandwidths, torus and hosts: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e,
# "System architecture" and "Configurations". Interconnect, one direction of all links: 2400 Gb/s
# for v4 (six of 50 GB/s; Jouppi et al. 2023, arXiv 2304.01433), 1600, 4800 and 3200 for the others.
#
# Matrix units: 4 of 128 × 128 a core, two cores on v4 and v5p. That makes 1.05 GHz for v4, the
# clock which that paper gives, 1.50 for v5e and 1.75 for v5p. Of v6e the page has said 4 units and
# 2; with 2 of 256 × 256 the compiler's estimate for a large product would be above the peak, so 4,
# which makes 1.75 GHz. (At these clocks the compiler's estimate for adding a constant to 1 GiB
# comes to 72 to 81 % of the memory bandwidth on all four.)
#
# Usable memory: the limit in the error of libtpu 0.0.52 for a program that is too large.
CHIPS: Mapping[str, TpuChip] = {
    chip.name: chip
    for chip in (
        TpuChip(
            "v4",
            peak_flops=275e12,
            flops_per_cycle=2 * 4 * 128**2 * 2,
            hbm_bytes=32 * _GIB,
            usable_hbm_bytes=round(30.75 * _GIB),
            hbm_bandwidth=1200e9,
            ici_bandwidth=300e9,
            dimensions=3,
            config="megacore",
        ),
        TpuChip(
            "v5e",
            peak_flops=197e12,
            flops_per_cycle=4 * 128**2 * 2,
            hbm_bytes=16 * _GIB,
            usable_hbm_bytes=round(15.75 * _GIB),
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,
            dimensions=2,
        ),
        TpuChip(
            "v5p",
            peak_flops=459e12,
            flops_per_cycle=2 * 4 * 128**2 * 2,
            hbm_bytes=96 * _GIB,
            usable_hbm_bytes=round(95.73 * _GIB),
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,
            dimensions=3,
            config="megacore",
        ),
        TpuChip(
            "v6e",
            peak_flops=918e12,
            flops_per_cycle=4 * 256**2 * 2,
            hbm_bytes=32 * _GIB,
            usable_hbm_bytes=round(31.24 * _GIB),
            hbm_bandwidth=1640e9,
            ici_bandwidth=400e9,
            dimensions=2,
        ),
    )
}
