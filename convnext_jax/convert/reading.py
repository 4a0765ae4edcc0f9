"""Published weights as NumPy arrays: any of the formats, from anywhere, without PyTorch.

Nothing of a file is run, and nothing of its tensors is read before someone looks at them: they are
read-only views of the memory-mapped file.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convnext_jax.convert.fetching import fetch
from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.groups import common_wrapper, pick_group
from convnext_jax.convert.hashing import digest, named_hash
from convnext_jax.convert.locating import WeightFiles, locate, read_json
from convnext_jax.convert.recognising import Kind, recognise
from convnext_jax.convert.safetensors_file import open_safetensors
from convnext_jax.convert.torch_file import open_torch
from convnext_jax.errors import UserError


@dataclass(frozen=True)
class WeightsFile:
    r"""The tensors of a file, and where they came from.

    Attributes:
      tensors: name -> read-only view of the mapped file, of the file's shape, order and dtype;
        bfloat16 is `ml_dtypes.bfloat16`. Tensors that share a storage share memory here. The files
        must not be shortened while these are in use.
      source: as the caller gave it.
      files: that hold the tensors; several where the checkpoint is sharded.
      sha256: of the file, in hexadecimal. Of several files, that of the lines
        "<SHA-256>  <name>\n", in the order of `files`, as `sha256sum` prints them.
      num_bytes: of the files together.
      metadata: "format" ("torch-zip", "torch-legacy" or "safetensors"); "group", which dict inside
        was taken ("" for the object itself, "model_ema"); "prefix", what was taken off every name
        ("" or "module."); "config", "preprocessor_config" and "open_clip_config", the content of
        the JSON files of these names beside the file, where there are any; "safetensors", that
        format's own metadata, if there is any.
    """

    tensors: Mapping[str, np.ndarray]
    source: str
    files: tuple[Path, ...]
    sha256: str
    num_bytes: int
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """One file of a checkpoint."""

    tensors: dict[str, np.ndarray]
    sha256: str
    metadata: dict[str, Any]


def _read_part(path: Path) -> _Part:
    try:
        kind = recognise(path)
        metadata: dict[str, Any] = {"format": kind.value, "group": ""}
        if kind is Kind.SAFETENSORS:
            tensors, text = open_safetensors(path)
            sha256, _ = digest(path)
            if text:
                metadata["safetensors"] = text
        else:
            file = open_torch(path, kind)
            sha256, wrong = digest(path, file.entries)
            group, metadata["group"] = pick_group(file.tree)
            tensors = {name: file.array(name, tensor) for name, tensor in group.items()}
            if wrong is not None:
                raise FormatError(
                    f"is damaged: the checksum of its entry {quote(wrong.name)} is wrong; download "
                    "it again"
                )
        size, claimed = path.stat().st_size, sum(array.nbytes for array in tensors.values())
        # Tied weights are there twice; a file whose tensors all lie on one storage is no model.
        if claimed > 4 * size:
            raise FormatError(
                f"is refused: its tensors lie on top of each other and claim {claimed:,} bytes of "
                f"a file of {size:,}; save them with .contiguous()"
            )
    except FormatError as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return _Part(tensors, sha256, metadata)


def _merge(files: WeightFiles, parts: list[_Part]) -> dict[str, np.ndarray]:
    """The tensors of all shards, which must be those that the index lists."""
    if files.index is None:
        return parts[0].tensors
    tensors: dict[str, np.ndarray] = {}
    for path, part in zip(files.files, parts, strict=True):
        listed = {name for name, file in files.weight_map.items() if file == path.name}
        odd = sorted(listed ^ part.tensors.keys())
        if odd:
            where = "lacks" if odd[0] in listed else "holds"
            raise UserError(
                f"{path} {where} {quote(odd[0])}, unlike {files.index} says"
                + (f", and {len(odd) - 1} more differ" if odd[1:] else "")
                + "; download both again"
            )
        tensors.update(part.tensors)
    return tensors


def _combined_sha256(files: tuple[Path, ...], parts: list[_Part]) -> str:
    if len(parts) == 1:
        return parts[0].sha256
    lines = (f"{part.sha256}  {path.name}\n" for path, part in zip(files, parts, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_weights(
    source: str | Path, *, sha256: str | None = None, cache_dir: Path | None = None
) -> WeightsFile:
    """Opens published weights, untrusted as they are.

    PyTorch's formats (`torch.save` of any version since 0.2) and safetensors are told apart by
    their content. Of a training file the averaged weights are taken where it has them. A wrapper's
    prefix that every name carries ("module.") is taken off.

    Args:
      source: the path of a file, of the index of a sharded checkpoint or of a directory with
        either; a URL; or `hf://owner/name[@revision][/file]`.
      sha256: what the file must hash to, in hexadecimal. A torchvision or timm file name that ends
        in the first digits of its hash is held to them without being asked.
      cache_dir: where downloads are kept; $CONVNEXT_JAX_CACHE or the user's cache directory by
        default.

    Returns:
      The tensors. The whole file has been read once for its hash, but is not in memory.

    Raises:
      UserError: in one sentence, if the source cannot be had or has another hash; if the file is
        no weights file, is damaged, or asks for anything to be run; if a tensor does not lie within
        its storage.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{quote(sha256)} is no SHA-256: that has 64 hexadecimal digits")
    files = locate(fetch(source, sha256=sha256, cache_dir=cache_dir))
    parts = [_read_part(path) for path in files.files]
    actual = _combined_sha256(files.files, parts)
    expected = sha256.lower() if sha256 else named_hash(files.files[0].name)
    if expected and not actual.startswith(expected):
        raise UserError(
            f"{files.index or files.files[0]} has the SHA-256 {actual}, not {expected}; "
            "it is another file or was changed; delete it and download it again"
        )
    tensors = _merge(files, parts)
    metadata = {key: value for part in reversed(parts) for key, value in part.metadata.items()}
    prefix = common_wrapper(tensors)
    metadata["prefix"] = prefix
    for name, config in files.configs.items():
        metadata[name] = read_json(config)
    return WeightsFile(
        tensors={name.removeprefix(prefix): array for name, array in tensors.items()},
        source=str(source),
        files=files.files,
        sha256=actual,
        num_bytes=sum(path.stat().st_size for path in files.files),
        metadata=metadata,
    )
