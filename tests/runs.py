"""Small runs of the training program: how tests start them, and what they read from them."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_config
from ml_collections import ConfigDict

from convnext_jax.training.checkpoints import Checkpointer
from convnext_jax.training.reporting import read_metrics
from convnext_jax.training.sharding import create_mesh, replicated

CONFIG_FILE = Path(tiny_config.__file__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended: its workdir and what it printed."""

    workdir: Path
    out: str
    err: str


def tiny(**fields: Any) -> ConfigDict:
    """The tiny config; a field's dots are written as double underscores."""
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def command(workdir: Path, *overrides: str, config: Path = CONFIG_FILE) -> list[str]:
    program = [sys.executable, "-m", "convnext_jax.train"]
    return [*program, "--config", str(config), "--workdir", str(workdir), *overrides]


def records(workdir: Path) -> list[dict[str, Any]]:
    """What a run measured, in order, without what the clock decides."""
    clocked = ("images_per_second", "wait_fraction", "first_step_seconds", "wall_seconds")
    found = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clocked} for record in found]


def column(workdir: Path, name: str, kind: str = "train") -> list[float]:
    return [record[name] for record in records(workdir) if record["kind"] == kind]


def checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as reader:
        on = replicated(create_mesh())
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on),
            reader.shapes(step),
        )
        state = reader.restore(abstract, step).state
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves
    }


def assert_bitwise_equal(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), f"{name} differs"


def digit_folder(root: Path, classes: int, count: int = 24) -> Path:
    """Writes `root/CLASS/*.png`: the first `count` digits of each of the first `classes`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(classes):
        (root / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(digits.target == label)[:count]:
            pixels = (digits.images[i] * 15).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{i:04}.png")
    return root
