"""PyTorch's format until 1.5: pickles one after the other, then the storages' bytes.

The pickles are a magic number, the protocol's version, the writer's byte order and type sizes, the
object itself, and the list of storage keys. Each storage follows as its number of elements (64
bits, little-endian) and its bytes.
"""

import mmap
from typing import Any

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.mapped import Cursor
from convnext_jax.convert.torch_tensors import Extent
from convnext_jax.convert.torch_unpickler import load

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LARGEST_PICKLES = 2**26


def read_legacy(data: mmap.mmap) -> tuple[Any, dict[str, Extent]]:
    """Reads the object and finds the storages.

    Args:
      data: the mapped file. Its storages are not touched.

    Returns:
      (the object as `torch_unpickler.load` gives it, where each storage lies by its key); every
      storage lies within the file.

    Raises:
      FormatError: if the file is damaged, truncated or hostile.
    """
    cursor = Cursor(data, 0, min(len(data), _LARGEST_PICKLES))
    if load(cursor).value != _MAGIC:
        raise FormatError("is damaged: it has not the magic number of torch.save")
    protocol = load(cursor).value
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise FormatError(f"is of PyTorch's legacy format, but not of its version {_PROTOCOL}")
    system = load(cursor).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FormatError(
            "was written on a big-endian machine, which is not read; in PyTorch, load it and save "
            "it again on a little-endian one"
        )
    pickled = load(cursor)
    keys = load(cursor).value
    if not isinstance(keys, list):
        raise FormatError("is damaged: it has no list of storages; download it again")
    extents: dict[str, Extent] = {}
    position = cursor.position
    for key in keys:
        key = str(key) if type(key) is int else key
        storage = pickled.storages.get(key) if type(key) is str else None
        if storage is None or key in extents:
            raise FormatError(
                f"is damaged: its list of storages names {quote(key)} twice, or without any tensor "
                "on it; download it again"
            )
        if position + 8 > len(data):
            raise FormatError(f"is truncated before its storage {quote(key)}; download it again")
        numel = int.from_bytes(data[position : position + 8], "little", signed=True)
        if numel != storage.numel:
            raise FormatError(
                f"is damaged: its storage {quote(key)} has {numel} elements where its tensors "
                f"expect {storage.numel}; download it again"
            )
        extent = Extent(position + 8, numel * storage.dtype.itemsize)
        position = extent.offset + extent.num_bytes
        if position > len(data):
            raise FormatError(
                f"is truncated: its storage {quote(key)} ends at byte {position} of {len(data)}; "
                "download it again"
            )
        extents[key] = extent
    return pickled.value, extents
