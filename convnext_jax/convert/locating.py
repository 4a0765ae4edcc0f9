"""From a path to the files that hold the weights: one, or the shards that an index lists."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convnext_jax.convert.format_error import quote
from convnext_jax.errors import UserError

# In a directory, or in a hub repository: the first that is there is taken. Safetensors first.
USUAL_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
CONFIG_NAMES = ("config.json", "open_clip_config.json", "preprocessor_config.json")

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_INDEX_SUFFIX = ".index.json"
_LARGEST_JSON = 2**26
_MOST_SHARDS = 1000


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights lie.

    Attributes:
      files: one, or the shards in the order of their names.
      weight_map: tensor -> name of its shard; empty where there is one file.
      index: the file that the map is from.
      configs: the files of `CONFIG_NAMES` beside them, by their names without ".json".
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = None
    configs: Mapping[str, Path] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      UserError: if it is none, or of an absurd size.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(f"{path} is far larger than a JSON file of a checkpoint; remove it")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON; download it again or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download it again or remove it")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """Reads the index of a sharded transformers checkpoint.

    Args:
      index: `model.safetensors.index.json` or `pytorch_model.bin.index.json`.

    Returns:
      Tensor -> file name; every name is that of a file right beside the index.

    Raises:
      UserError: if the index is damaged or names a file elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map, so it is no index of a sharded checkpoint")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not file.endswith(_SUFFIXES)
            or any(character in file for character in "/\\:\0")
        ):
            raise UserError(
                f"{index} says that {quote(name)} lies in {quote(file)}, which is not the name of "
                "a weights file beside it"
            )
    if len(set(weight_map.values())) > _MOST_SHARDS:
        raise UserError(f"{index} lists more than {_MOST_SHARDS} files")
    return weight_map


def _configs_beside(path: Path) -> dict[str, Path]:
    candidates = (path.parent / name for name in CONFIG_NAMES)
    return {config.stem: config for config in candidates if config.is_file()}


def _choose(directory: Path) -> Path:
    for name in USUAL_NAMES:
        if (directory / name).is_file():
            return directory / name
    there = sorted(p for p in directory.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(there) == 1:
        return there[0]
    if there:
        names = ", ".join(p.name for p in there[:8])
        raise UserError(f"{directory} holds several weights files, {names}; give one of them")
    raise UserError(
        f"{directory} holds no weights file: neither {', '.join(USUAL_NAMES)} nor any other "
        f"{', '.join(_SUFFIXES)}"
    )


def locate(path: Path) -> WeightFiles:
    """Finds the files of a checkpoint.

    Args:
      path: of a weights file, of the index of a sharded checkpoint, or of a directory with either.

    Returns:
      The files, all of which exist.

    Raises:
      UserError: if there are none, or a shard is missing.
    """
    if path.is_dir():
        path = _choose(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; a hub name is written hf://owner/name")
    configs = _configs_beside(path)
    if not path.name.endswith(_INDEX_SUFFIX):
        return WeightFiles((path,), configs=configs)
    weight_map = read_weight_map(path)
    files = tuple(path.parent / name for name in sorted(set(weight_map.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path} lists {len(files)} files of which {len(missing)} are not beside it: "
            f"{', '.join(missing[:8])}; download them too"
        )
    return WeightFiles(files, weight_map, path, configs)
