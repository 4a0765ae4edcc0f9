"""A file by `torch.save` as a tree whose tensors become arrays on demand."""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.mapped import map_file
from convnext_jax.convert.recognising import Kind
from convnext_jax.convert.torch_legacy import read_legacy
from convnext_jax.convert.torch_tensors import Extent, Tensor, to_array
from convnext_jax.convert.torch_unpickler import load
from convnext_jax.convert.torch_zip import Entry, pickle_of, read_archive


@dataclass(frozen=True)
class TorchFile:
    """An open file by `torch.save`.

    Attributes:
      tree: what was saved; a tensor is a `torch_tensors.Tensor`.
      extents: where the storages lie, by key.
      entries: of the zip archive, with their checksums; empty in the legacy format.
      data: the mapped file.
    """

    tree: Any
    extents: Mapping[str, Extent]
    entries: tuple[Entry, ...]
    data: mmap.mmap

    def array(self, name: str, tensor: Tensor) -> np.ndarray:
        """A tensor of the tree as a read-only view of the file.

        Args:
          name: for messages.
          tensor: of this tree.

        Returns:
          The array, of the file's dtype; bfloat16 is `ml_dtypes.bfloat16`.

        Raises:
          FormatError: if its storage is missing or of another length, or it reaches out of it.
        """
        storage = tensor.storage
        extent = self.extents.get(storage.key)
        if extent is None:
            raise FormatError(
                f"is damaged: tensor {quote(name)} is on the storage {quote(storage.key)}, which "
                "the file does not hold; download it again"
            )
        expected = storage.numel * storage.dtype.itemsize
        if extent.num_bytes != expected:
            raise FormatError(
                f"is damaged: tensor {quote(name)} is on a storage of {extent.num_bytes} bytes, "
                f"which should have {expected}; download it again, from a source that you trust"
            )
        return to_array(name, tensor, self.data, extent)


def open_torch(path: Path, kind: Kind) -> TorchFile:
    """Opens a file by `torch.save`; reads its pickle, and of its tensors nothing.

    Args:
      path: of the file.
      kind: `TORCH_ZIP` or `TORCH_LEGACY`.

    Returns:
      The open file.

    Raises:
      FormatError: if it is damaged, hostile or of another kind.
    """
    data = map_file(path)
    if kind is Kind.TORCH_LEGACY:
        tree, extents = read_legacy(data)
        return TorchFile(tree, extents, (), data)
    archive = read_archive(data)
    tree = load(pickle_of(data, archive)).value
    return TorchFile(tree, archive.storages, archive.entries, data)
