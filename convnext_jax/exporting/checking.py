"""What was written is read again, run, and held against the network that it came from."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.errors import RunStoppedError
from convnext_jax.exporting.interface import Interface
from convnext_jax.inference import forward

# Relative to the largest output. The same program should give the same, another runtime nearly so;
# bfloat16 rounds wherever a compiler chooses to store.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def check_file(
    file: Path, form: Mapping[str, Any], pretrained: Pretrained, interface: Interface
) -> str:
    """Runs a written file on two random images, and the network too.

    Args:
      file: StableHLO or ONNX.
      form: "format", "dtype", and of StableHLO "weights_as_first_argument", the name of an .npz
        beside the file, or None.
      pretrained: the network.
      interface: what goes into the file and comes out.

    Returns:
      A sentence with the difference, or why the file could not be run here.

    Raises:
      RunStoppedError: if the outputs differ by more than `TOLERANCE`.
    """
    side = interface.image_size or pretrained.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    if interface.pixels == "float32":
        images = (images / np.float32(64) - 2).astype(np.float32)
    if form["format"] == "onnx":
        output = _run_onnx(file, images)
    else:
        weights = form["weights_as_first_argument"]
        output = _run_stablehlo(file, weights and file.with_name(weights), images)
    if isinstance(output, str):
        return f"not checked: {output}"

    expected = np.asarray(
        jax.jit(forward(pretrained, interface.output, interface.pixels))(
            pretrained.variables, jnp.asarray(images)
        )
    )
    largest = float(np.abs(expected).max())
    difference = float(np.abs(output - expected).max())
    # Written so that NaN does not pass.
    if not difference <= TOLERANCE[form["dtype"]] * largest:
        raise RunStoppedError(
            f"the {interface.output} of the written file differ by {difference:.2g}, of at most "
            f"{largest:.2g}, from the network's, and so it was not kept"
        )
    return (
        f"checked on 2 random images: the {interface.output}, of at most {largest:.3g}, differ by "
        f"{difference:.2g} from the network's"
    )


def _run_stablehlo(file: Path, weights: Path | None, images: np.ndarray) -> np.ndarray | str:
    network = jax.export.deserialize(bytearray(file.read_bytes()))
    if jax.export.default_export_platform() not in network.platforms:
        return f"this machine is none of {', '.join(network.platforms)}"
    arguments = [dict(np.load(weights, allow_pickle=False))] if weights else []
    return np.asarray(network.call(*arguments, images))


def _run_onnx(file: Path, images: np.ndarray) -> np.ndarray | str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    import onnxruntime

    network = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = network.run(None, {"images": images})
    return np.asarray(output)
