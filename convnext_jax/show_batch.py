"""Shows what a model is trained on: python -m convnext_jax.show_batch --config configs/digits.py.

Writes a PNG contact sheet of one augmented batch, under each image its labels and their weights;
with --operations, instead, one sheet for each operation of the config's policy: over a range of
arguments what the accelerator makes of an image, and what Pillow does.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from convnext_jax import cli, config_files, experiment
from convnext_jax.contact_sheets import Tile, contact_sheet
from convnext_jax.data.augment import AugmentConfig
from convnext_jax.data.color_ops import round_factor
from convnext_jax.data.loader import train_loader
from convnext_jax.data.operations import OPERATIONS
from convnext_jax.data.pillow_ops import pillow
from convnext_jax.errors import UserError
from convnext_jax.training.preparation import prepare_batch

_EXAMPLES = """
a batch as the network sees it, to batch.png
  python -m convnext_jax.show_batch --config configs/digits.py
each operation of the policy, over its range, beside Pillow's
  python -m convnext_jax.show_batch --config configs/finetune_folder.py \\
    --config.data.data_dir=PHOTOS --operations
"""

COLUMNS = 8
_FACTORS = (0.1, 0.4, 0.7, 1.3, 1.6, 1.9)
# Where an argument is in pixels, these are shares of the image's shorter side.
ARGUMENTS: dict[str, tuple[float, ...]] = {
    "Rotate": (-30, -15, -3, 3, 15, 30),
    "Posterize": (0, 1, 2, 3, 4, 8),
    "Solarize": (0, 26, 76, 128, 204, 256),
    "SolarizeAdd": (0, 22, 44, 66, 88, 110),
    "Color": _FACTORS,
    "Contrast": _FACTORS,
    "Brightness": _FACTORS,
    "Sharpness": _FACTORS,
    "ShearX": (-0.3, -0.15, -0.03, 0.03, 0.15, 0.3),
    "ShearY": (-0.3, -0.15, -0.03, 0.03, 0.15, 0.3),
    "TranslateX": (-0.45, -0.225, -0.045, 0.045, 0.225, 0.45),
    "TranslateY": (-0.45, -0.225, -0.045, 0.045, 0.225, 0.45),
    "GaussianBlur": (0.1, 0.5, 1.0, 1.4, 1.7, 2.0),
}


def host_batch(config: ConfigDict, step: int) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The batch that the hosts send at a step, and the classes' names."""
    source = experiment.open_train_source(config)
    experiment.durations(config, len(source))
    batches = train_loader(
        source,
        experiment.train_transform(config),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=step,
        num_steps=step + 1,
        repeats=config.data.repeats,
        on_bad_image=config.data.on_bad_image,
    )
    with contextlib.closing(batches):
        return next(batches), source.class_names


def to_levels(images: jax.Array, config: AugmentConfig) -> np.ndarray:
    """Takes normalisation back; what noise put out of range is clipped.

    Args:
      images: floats (B, H, W, 3).
      config: of the augmentation.

    Returns:
      uint8 (B, H, W, 3).
    """
    levels = (np.asarray(images) * np.array(config.std) + np.array(config.mean)) * 255
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def captions(targets: np.ndarray, smoothing: float, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Each image's classes and their weights, read off its target.

    Args:
      targets: float32 (B, K).
      smoothing: s, which each target holds.
      names: of the classes.

    Returns:
      Two lines for each image, the second one empty where only one class has weight.
    """
    weights = (targets - smoothing / targets.shape[1]) / max(1 - smoothing, 1e-6)
    lines = []
    for row in weights:
        shown = [
            f"{row[k]:.2f} {names[k] if k < len(names) else k}"
            for k in np.argsort(-row)[:2]
            if row[k] > 5e-3
        ]
        lines.append((*shown, "", "")[:2])
    return lines


def batch_sheet(config: ConfigDict, step: int) -> Image.Image:
    """The contact sheet of a training batch, as the model sees it."""
    batch, names = host_batch(config, step)
    augmentation, mixing = experiment.build_augmentation(config), experiment.build_mixing(config)
    num_classes = config.model.num_classes or len(names)

    @jax.jit
    def prepare(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return prepare_batch(
            jax.random.fold_in(jax.random.key(config.seed), step),
            batch,
            num_classes=num_classes,
            augment_config=augmentation,
            mix_config=mixing,
        )

    images, targets = prepare({name: jnp.asarray(batch[name]) for name in ("image", "label")})
    lines = captions(np.asarray(targets), mixing.label_smoothing, names)
    levels = to_levels(images, augmentation)
    return contact_sheet([Tile(*pair) for pair in zip(levels, lines, strict=True)], COLUMNS)


def operation_sheet(name: str, image: np.ndarray, config: AugmentConfig) -> Image.Image:
    """One operation over its arguments: above the accelerator's results, below Pillow's."""
    arguments = np.array(ARGUMENTS.get(name, (0.0,)), np.float32)
    if name in ("TranslateX", "TranslateY"):
        arguments *= min(image.shape[:2])
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        arguments = np.asarray(round_factor(jnp.asarray(arguments)))

    @jax.jit
    def ours(argument: jax.Array) -> jax.Array:
        planes = jnp.asarray(image).transpose(2, 0, 1)
        done = OPERATIONS[name](planes, argument, config.fill, config.interpolation)
        return done.transpose(1, 2, 0)

    mine, theirs = [], []
    for argument in arguments:
        found = np.asarray(ours(argument))
        wanted = pillow(name, image, float(argument), config.fill, config.interpolation)
        difference = np.abs(found.astype(int) - wanted)
        shown = f"{name} {argument:.3g}" if name in ARGUMENTS else name
        mine.append(Tile(found, (shown,)))
        off = (f"Pillow: off by {difference.mean():.3f},", f"at most {difference.max()}")
        theirs.append(Tile(wanted, off))
    return contact_sheet(mine + theirs, len(arguments))


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another --out, or --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no directory {path.parent}")


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, "PNG", optimize=True)
    print(f"wrote {path}, {image.width} × {image.height}")


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "show_batch",
        "Write a contact sheet of an augmented training batch.",
        _EXAMPLES,
        "Any field of the config is set by --config.FIELD=VALUE.",
    )
    cli.add_config_argument(parser)
    parser.add_argument(
        "--out", type=Path, help="the PNG file, batch.png; with --operations a folder, operations"
    )
    parser.add_argument("--images", type=int, default=32, help="of the batch (32)")
    parser.add_argument("--step", type=int, default=0, help="of the run (0)")
    parser.add_argument(
        "--operations", action="store_true", help="a sheet for each operation, beside Pillow's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.images < 1 or arguments.step < 0:
        raise UserError("--images must be 1 or more, --step 0 or more")
    config = config_files.load_config(arguments.config, [*overrides, "--config.data.workers=0"])
    config.batch_size = arguments.images

    if not arguments.operations:
        out = arguments.out or Path("batch.png")
        _check_free(out, overwrite=arguments.overwrite)
        _save(batch_sheet(config, arguments.step), out)
        return
    augmentation = experiment.build_augmentation(config)
    if augmentation.policy is None:
        raise UserError(
            "config.augment.policy is empty, so there are no operations to show; give one, such as "
            "--config.augment.policy=rand-m9-mstd0.5-inc1"
        )
    folder = arguments.out or Path("operations")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; with --operations give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in augmentation.policy.names if name != "Identity"]
    for name in names:
        _check_free(folder / f"{name}.png", overwrite=arguments.overwrite)
    batch, _ = host_batch(config, arguments.step)
    for name in names:
        _save(operation_sheet(name, batch["image"][0], augmentation), folder / f"{name}.png")


if __name__ == "__main__":
    sys.exit(cli.run(main))
