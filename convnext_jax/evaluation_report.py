"""What an evaluation says of itself before it begins, and of its result."""

import argparse
from collections.abc import Mapping
from typing import Any

import jax

from convnext_jax.analysis.corruption_error import (
    SEVERITIES,
    corruption_errors,
    mean_corruption_error,
)
from convnext_jax.convert.preprocessing import Preprocessing
from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.data.benchmarks import Benchmark
from convnext_jax.data.class_matching import ClassMatch
from convnext_jax.training.batch_size import FittingBatch
from convnext_jax.training.console import duration
from convnext_jax.training.progress import rate_text


def summary(result: Mapping[str, Any], benchmark: Benchmark) -> dict[str, str]:
    """The result as a person reads it."""

    def proportion(name: str) -> str:
        low, high = result[f"{name}_interval"]
        return f"{result[name]:7.2%}   (95 % interval {low:.2%} to {high:.2%})"

    rate = result["images_per_second"]
    lines = {
        "top-1": proportion("accuracy"),
        "top-5": proportion("top5"),
        "loss": "none" if result["loss"] is None else f"{result['loss']:7.4f}",
        "images": f"{result['examples']:,}",
    }
    if result["left_out"]:
        why = "cannot be decoded"
        if benchmark.label_sets is not None:
            why = "have no right label, or cannot be decoded"
        lines["left out"] = f"{result['left_out']:,} that {why}"
    lines["time"] = duration(result["seconds"]) + (f", {rate_text(rate)}" if rate else "")
    return lines


def corruption_table(errors: Mapping[tuple[str, int], float]) -> str:
    """Top-1 errors of ImageNet-C in percent, and each corruption's error as AlexNet's share."""
    each = corruption_errors(errors)
    head = "".join(f"{severity:>7}" for severity in SEVERITIES)
    lines = [f"{'top-1 error, %; severity':<26}{head}{'mean':>8}{'CE':>8}"]
    for name, relative in each.items():
        row = [100 * errors[name, severity] for severity in SEVERITIES]
        cells = "".join(f"{error:7.1f}" for error in row)
        lines.append(f"{name:<26}{cells}{sum(row) / len(row):8.1f}{100 * relative:8.1f}")
    everything = 100 * sum(errors.values()) / len(errors)
    mce = 100 * mean_corruption_error(errors)
    lines.append(f"{'mean (mCE)':<61}{everything:8.1f}{mce:8.1f}")
    return "\n".join(lines)


def facts(
    arguments: argparse.Namespace,
    pretrained: Pretrained,
    benchmarks: Mapping[str, Benchmark],
    matched: ClassMatch,
    preprocessing: Preprocessing,
    batch: FittingBatch,
    mesh: jax.sharding.Mesh,
) -> dict[str, str]:
    """What a person checks before trusting a number."""
    model, identity = pretrained.model, next(iter(benchmarks.values())).source.identity
    images = sum(len(benchmark.source) for benchmark in benchmarks.values())
    size, resized = preprocessing.image_size, preprocessing.resize_size
    name = arguments.dataset
    if len(benchmarks) == 1:
        split = arguments.split or identity["split"]
        name = " ".join(filter(None, (name, str(identity["version"]), repr(split))))
    memory = ""
    if batch.bytes_needed is not None and batch.bytes_available is not None:
        memory = f", {batch.bytes_needed / 2**30:.1f} of {batch.bytes_available / 2**30:.1f} GiB"
    facts = {
        "model": f"{pretrained.model_name or 'ConvNeXt'}, {model.num_classes:,} classes, "
        f"{arguments.dtype}",
        "weights": f"{arguments.weights}"
        + (f", SHA-256 {pretrained.sha256}" if pretrained.sha256 else ""),
        "data set": f"{name}, {images:,} images"
        + (f" in {len(benchmarks)} parts" if len(benchmarks) > 1 else ""),
        "images": f"{size} × {size} pixels, {preprocessing.interpolation}, "
        + ("the whole image" if resized is None else f"cropped from a short side of {resized}"),
        "devices": f"{mesh.size} × {jax.devices()[0].device_kind}, "
        f"{batch.size} images a batch, {batch.size // mesh.size} a device{memory}",
    }
    if matched.answers is not None:
        facts["answers"] = f"among {int(matched.answers.sum()):,} of the model's classes"
    notes = [note for note in (*pretrained.notes, matched.note) if note]
    return facts | {f"note {i}": note for i, note in enumerate(notes, start=1)}
