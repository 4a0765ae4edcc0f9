"""What to do with a run that has ended: the commands, ready to be typed."""

import importlib.util
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import Network
from convnext_jax.training.reporting import TENSORBOARD_DIR


def next_steps(config: ConfigDict, model: Network, workdir: Path) -> dict[str, str]:
    """The commands that a newcomer looks for behind a run's last line.

    Args:
      config: of the run.
      model: its network.
      workdir: where it lies.

    Returns:
      Label to command, in the order of printing. IMAGE and PHOTOS stand for the user's own.
    """
    place = shlex.quote(str(workdir))
    board = f"tensorboard --logdir {shlex.quote(str(workdir / TENSORBOARD_DIR))}"
    if importlib.util.find_spec("tensorboard") is None:
        board = f"pip install tensorboard && {board}"
    steps = {
        "predict": f"python -m convnext_jax.predict --weights {place} IMAGE",
        "look at curves": board,
    }
    # The recipe for photographs scales learning rates by layer, which only ConvNeXt names.
    if isinstance(model, ConvNeXt):
        steps["fine-tune"] = " ".join(_fine_tuning(config, workdir))
    return steps


def _fine_tuning(config: ConfigDict, workdir: Path) -> list[str]:
    photos = workdir.with_name(f"{workdir.name}_photos")
    fields = {
        "data.data_dir": "PHOTOS",
        "init_from": workdir,
        "data.image_size": config.data.image_size,
        "model.dtype": config.model.dtype,
        "augment.mean": tuple(config.augment.mean),
        "augment.std": tuple(config.augment.std),
        **{f"model.overrides.{key}": value for key, value in config.model.overrides.items()},
    }
    return [
        *("python", "-m", "convnext_jax.train"),
        *("--config", f"configs/finetune_folder.py:{config.model.name}"),
        *("--workdir", shlex.quote(str(photos))),
        *(shlex.quote(f"--config.{name}={value}") for name, value in fields.items()),
    ]
