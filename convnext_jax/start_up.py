"""What a run says of itself before its first step."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from convnext_jax.analysis.macs import count_macs, count_parameters
from convnext_jax.compilation_cache import cache_directory
from convnext_jax.data.loader import eval_steps
from convnext_jax.data.sources import Source
from convnext_jax.experiment import Durations
from convnext_jax.models.registry import Network


def _giga(count: int) -> str:
    return f"{count / 1e9:.3f} G" if count >= 1e9 else f"{count / 1e6:.3f} M"


def start_up_report(
    config: ConfigDict,
    model: Network,
    mesh: jax.sharding.Mesh,
    source: Source,
    eval_source: Source | None,
    steps: Durations,
    *,
    start: int,
    workdir: Path,
) -> dict[str, str]:
    """The facts that a person checks before a run is left alone.

    Args:
      config: the run.
      model: its model.
      mesh: the devices.
      source: the training split.
      eval_source: the evaluation split, or None.
      steps: the run's durations.
      start: the step that it goes on from, 0 for a new run.
      workdir: where it lies.

    Returns:
      Label to text, in the order of printing.
    """
    size = config.data.image_size
    device = jax.devices()[0]
    micro = config.batch_size // mesh.size // config.optim.accumulation_steps
    evaluation = "none"
    if eval_source is not None:
        evaluation = (
            f"{len(eval_source):,} images of {eval_source.identity['split']!r}, "
            f"{eval_steps(len(eval_source), config.eval_batch_size)} steps"
        )
    return {
        "model": f"{config.model.name}, {model.num_classes} classes, {config.model.dtype}",
        "parameters": f"{count_parameters(model, size):,}",
        "MACs": f"{_giga(count_macs(model, size))} at {size} × {size} pixels",
        "devices": f"{mesh.size} × {device.device_kind}, {jax.process_count()} processes",
        "mesh": ", ".join(f"{axis} {length}" for axis, length in mesh.shape.items()),
        "batch": f"{config.batch_size}, {config.batch_size // mesh.size} a device"
        + (f" in micro-batches of {micro}" if config.optim.accumulation_steps > 1 else ""),
        "training set": f"{len(source):,} images of {config.data.name} {config.data.train_split!r}",
        "evaluation set": evaluation,
        "steps": f"{steps.total:,} ({steps.steps_per_epoch:,} an epoch, warm-up {steps.warmup:,})",
        "compilation cache": cache_directory() or "none",
        "workdir": f"{workdir}, {f'resumed at step {start:,}' if start else 'a new run'}",
    }
