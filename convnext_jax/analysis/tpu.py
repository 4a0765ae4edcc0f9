"""Compiling for TPUs on a machine that has none, by the compiler within libtpu."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from convnext_jax.analysis.tpu_chips import CHIPS, TpuChip
from convnext_jax.errors import UserError

# Read when libtpu is loaded, which is when the first topology is asked for. It must not look for
# the host's own TPU, nor for a cloud's metadata server; and it may be loaded in several processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Else every process leaves its logs under the system's temporary directory.
    "TPU_LOG_DIR": "disabled",
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# "Used 20.31G of 15.75G hbm.", or for a single array too large "(512.00G) exceeds … (15.75G)".
_OVERFLOW = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


class OutOfHbmError(RuntimeError):
    """The TPU compiler refused a program for its size.

    Attributes:
      needed: bytes of each chip's memory that it would take, as far as the compiler said.
      available: bytes that a program may take; None where it didn't say.
      text: all that the compiler said, its largest arrays among it.
    """

    def __init__(self, needed: int | None, available: int | None, text: str):
        super().__init__(text)
        self.needed, self.available, self.text = needed, available, text


@dataclasses.dataclass(frozen=True)
class TpuTopology:
    """A slice of TPU chips to compile for.

    Attributes:
      name: "v5e:16x16".
      chip: its type.
      shape: chips along each dimension of the torus.
      devices: to make a mesh of, one a chip. They compile, and can't hold arrays.
    """

    name: str
    chip: TpuChip
    shape: tuple[int, ...]
    devices: tuple[jax.Device, ...]

    @property
    def hosts(self) -> int:
        """Machines that the slice hangs on."""
        return math.ceil(len(self.devices) / self.chip.chips_per_host)


def tpu_topology(name: str) -> TpuTopology:
    """Describes a slice of TPU chips, none of which need be there.

    JAX is held to the CPU for the rest of the process, so that it never starts a TPU.

    Args:
      name: chip type and shape, "v5e:16x16" or "v4:4x4x8".

    Returns:
      The topology.

    Raises:
      UserError: if libtpu is not installed, or knows no such topology.
    """
    kind, _, shape_text = name.partition(":")
    chip = CHIPS.get(kind)
    forms = " or ".join(
        f"{', '.join(c.name for c in CHIPS.values() if c.dimensions == n)} with a shape like {like}"
        for n, like in ((2, "16x16"), (3, "4x4x8"))
    )
    shape = tuple(int(n) for n in shape_text.split("x")) if _is_shape(shape_text) else ()
    if chip is None or len(shape) != chip.dimensions or 0 in shape:
        raise UserError(
            f"{name!r} is no topology that is known here; write CHIP:SHAPE, where the chip is "
            f"{forms}"
        )
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "this takes the TPU compiler, which is not installed: pip install 'convnext-jax[plan]'"
        )
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    # A slice within a host is all that host has; larger ones are made of hosts of 2 × 2.
    bounds = [min(n, 2) for n in shape[:2]] + [1]
    try:
        topology = topologies.get_topology_desc(
            name, "tpu", chip_config_name=chip.config, chips_per_host_bounds=bounds
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"libtpu knows no topology {name!r}: {str(error).splitlines()[0]}"
        ) from error
    devices = tuple(topology.devices)
    assert len(devices) == math.prod(shape)
    return TpuTopology(name, chip, shape, devices)


def _is_shape(text: str) -> bool:
    return re.fullmatch(r"\d+(x\d+)+", text) is not None


def compile_for_tpu(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compiles a jitted function whose arguments' shardings lie on a topology's devices.

    Args:
      function: from `jax.jit`.
      *arguments: ShapeDtypeStructs.

    Returns:
      The program; it can be read, not run.

    Raises:
      OutOfHbmError: if the compiler finds that it does not fit a chip's memory.
    """
    lowered = function.trace(*arguments).lower()  # type: ignore[attr-defined]
    # JAX's cache on disk would take the program, but can't give it back where there is no TPU.
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not text.startswith("RESOURCE_EXHAUSTED"):
            raise
        needed, available = overflow(text)
        raise OutOfHbmError(needed, available, text) from error
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def overflow(text: str) -> tuple[int | None, int | None]:
    """Bytes needed and bytes available by the compiler's message, None where it names none."""
    for pattern in _OVERFLOW:
        if match := pattern.search(text):
            needed, unit, available, other = match.groups()
            return (
                round(float(needed) * _UNITS[unit]),
                round(float(available) * _UNITS[other]),
            )
    return None, None
