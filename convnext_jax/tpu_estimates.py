"""The column of TPU estimates, as the programs that compare networks have it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

import jax.numpy as jnp

from convnext_jax.analysis.estimate_cache import EstimateCache, InferenceEstimate
from convnext_jax.analysis.inference_cost import compiler_versions, estimate_inference
from convnext_jax.analysis.tpu import OutOfHbmError, TpuTopology, tpu_topology
from convnext_jax.errors import UserError
from convnext_jax.models.registry import create_model

_log = logging.getLogger(__name__)
_DEFAULT_TOPOLOGY = "v5e:1x1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --topology, --tpu_batch_size, --estimates and --no_estimate.

    Args:
      parser: of the program; what is given goes to `TpuEstimates`.
    """
    group = parser.add_argument_group(
        "TPU estimates", "what the TPU compiler expects of inference in bfloat16; no TPU is needed"
    )
    group.add_argument(
        "--topology", help=f"chip and shape, of which one chip is taken; {_DEFAULT_TOPOLOGY}"
    )
    group.add_argument("--tpu_batch_size", type=int, default=128, help="images a chip; 128")
    group.add_argument(
        "--estimates",
        metavar="FILE",
        help="keep estimates in this JSON file, and take from it what need not be compiled anew",
    )
    group.add_argument("--no_estimate", action="store_true", help="compile nothing")


class TpuEstimates:
    """Estimates by the networks' names, as the arguments ask for them.

    Args:
      arguments: of a parser that `add_arguments` was called with.
      image_size: side in pixels.

    Attributes:
      note: what they are, or why there are none.

    Raises:
      UserError: for a topology or a file that is none, or arguments that contradict each other.
    """

    def __init__(self, arguments: argparse.Namespace, image_size: int):
        self._image_size, self._batch_size = image_size, arguments.tpu_batch_size
        if self._batch_size < 1:
            raise UserError(f"--tpu_batch_size is {self._batch_size}; it must be 1 or more")
        self._topology: TpuTopology | None = None
        if arguments.no_estimate:
            if arguments.topology or arguments.estimates:
                raise UserError(
                    "--no_estimate goes with neither --topology nor --estimates; leave it out"
                )
            self.note = "TPU estimates left out by --no_estimate"
            return
        self._cache = EstimateCache(arguments.estimates)
        try:
            self._topology = tpu_topology(arguments.topology or _DEFAULT_TOPOLOGY)
        except UserError as error:
            # Of the default nothing can be wrong but that there is no compiler for it.
            if arguments.topology:
                raise
            self.note = f"TPU estimates left out: {error}"
            return
        versions = ", ".join(f"{name} {version}" for name, version in compiler_versions().items())
        self.note = (
            f"TPU: inference in bfloat16, {self._batch_size} images of {image_size} × {image_size} "
            f"a batch, one {self._topology.chip.name} chip; the compiler's estimates, no "
            f"measurements ({versions})"
        )

    @property
    def heading(self) -> str:
        """Of the column; "" where there is none."""
        return f"{self._topology.chip.name} images/s, est." if self._topology else ""

    def of(self, names: Sequence[str]) -> dict[str, InferenceEstimate | None]:
        """Compiles what is not kept; each takes the compiler some ten seconds to a minute.

        Args:
          names: of the registry.

        Returns:
          The estimates by name; None for a network that does not fit the chip's memory.
        """
        found: dict[str, InferenceEstimate | None] = {}
        for i, name in enumerate(names if self._topology else (), start=1):
            assert self._topology is not None
            _log.info(f"TPU estimate {i} of {len(names)}: {name}")
            try:
                found[name] = estimate_inference(
                    create_model(name, dtype=jnp.bfloat16),
                    self._topology,
                    image_size=self._image_size,
                    batch_size=self._batch_size,
                    cache=self._cache,
                    label=name,
                )
            except OutOfHbmError:
                found[name] = None
        return found
