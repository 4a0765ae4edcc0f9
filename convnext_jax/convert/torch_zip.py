"""PyTorch's format since 1.6: an uncompressed zip archive of one pickle and one entry a storage.

The archive's directory is read here rather than by `zipfile`, which accepts what no weights file
has: compressed entries (zip bombs), entries that overlap, two of one name, links, encryption.
"""

import mmap
import stat
import struct
import zlib
from collections import Counter
from typing import NamedTuple

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.mapped import Cursor
from convnext_jax.convert.torch_tensors import Extent

_END = b"PK\x05\x06"
_END_SIZE = 22
_END_64 = b"PK\x06\x06"
_LOCATOR_64 = b"PK\x06\x07"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_ZIP64 = 0xFFFFFFFF
# A weights file has an entry a tensor, and each takes less than 200 bytes of the directory.
_LARGEST_DIRECTORY = 2**26
_MOST_ENTRIES = 200_000
_LARGEST_PICKLE = 2**26

_TRUSTED = "download it again, from a source that you trust"
_TRUNCATED = f"is truncated or damaged: its zip directory cannot be read; {_TRUSTED}"


class Entry(NamedTuple):
    """One entry of the archive.

    Attributes:
      extent: where its bytes lie.
      crc32: as the archive states it; 0 where PyTorch was told not to compute it.
    """

    name: str
    extent: Extent
    crc32: int


class Archive(NamedTuple):
    """What the directory lists.

    Attributes:
      pickle: the entry `data.pkl`.
      storages: where each storage lies, by its key.
      entries: all of them.
    """

    pickle: Entry
    storages: dict[str, Extent]
    entries: tuple[Entry, ...]


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """The directory's position, size and number of entries."""
    tail = data[max(0, len(data) - _END_SIZE - 2**16) :]
    found = tail.rfind(_END)
    if found < 0 or len(tail) - found < _END_SIZE:
        raise FormatError(
            "is truncated: a zip archive's directory lies at its end, and there is none; "
            "download it again"
        )
    end = len(data) - len(tail) + found
    count, size, offset = struct.unpack_from("<HLL", data, end + 10)
    if end >= 20 and data[end - 20 : end - 16] == _LOCATOR_64:
        (at,) = struct.unpack_from("<Q", data, end - 12)
        if at + 56 > end or data[at : at + 4] != _END_64:
            raise FormatError(_TRUNCATED)
        count, size, offset = struct.unpack_from("<QQQ", data, at + 32)
    if offset + size > end:
        raise FormatError(_TRUNCATED)
    if size > _LARGEST_DIRECTORY or count > _MOST_ENTRIES:
        raise FormatError(f"is refused: its zip directory lists {count:,} entries; {_TRUSTED}")
    return offset, size, count


def _sizes_64(extra: bytes, values: list[int]) -> list[int]:
    """Puts the 64-bit sizes of a zip64 field in place of those that did not fit 32 bits."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            numbers = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return [next(numbers) if value == _IN_ZIP64 else value for value in values]
    return values


def _check_name(name: str) -> None:
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ".." in parts or (name[1:2] == ":"):
        raise FormatError(
            f"is refused: its zip entry {quote(name)} points out of the archive; {_TRUSTED}"
        )


def _entry(data: mmap.mmap, at: int, end: int) -> tuple[Entry, int]:
    """The entry that the directory describes at `at`, and where the next description begins."""
    (
        signature, made_by, _needs, flags, method, _time, _date, crc32, packed, size,
        name_length, extra_length, comment_length, _disk, _internal, external, local,
    ) = _ENTRY.unpack_from(data, at)  # fmt: skip
    after = at + _ENTRY.size + name_length + extra_length + comment_length
    if signature != b"PK\x01\x02" or after > end:
        raise FormatError(_TRUNCATED)
    raw = data[at + _ENTRY.size : at + _ENTRY.size + name_length]
    extra = data[at + _ENTRY.size + name_length : after - comment_length]
    name = raw.decode("utf-8")
    _check_name(name)
    called = f"its zip entry {quote(name)}"
    size, packed, local = _sizes_64(extra, [size, packed, local])
    if flags & 1:
        raise FormatError(f"is refused: {called} is encrypted; give an unencrypted file")
    if made_by >> 8 == 3 and stat.S_ISLNK(external >> 16):
        raise FormatError(f"is refused: {called} is a symbolic link; {_TRUSTED}")
    if method != 0:
        raise FormatError(
            f"is refused: {called} is compressed, which torch.save never does; unpack the archive "
            "and pack it again with `zip -0 -r`"
        )
    if packed != size or local + _LOCAL.size > len(data):
        raise FormatError(f"is damaged: {called} states two sizes or lies outside the file")
    header = _LOCAL.unpack_from(data, local)
    start = local + _LOCAL.size + header[-2] + header[-1]
    if header[0] != b"PK\x03\x04":
        raise FormatError(_TRUNCATED)
    if data[local + _LOCAL.size : local + _LOCAL.size + header[-2]] != raw:
        raise FormatError(f"is damaged: {called} has another name where its bytes are; {_TRUSTED}")
    if start + size > len(data):
        raise FormatError(f"is truncated: {called} reaches past the end; download it again")
    return Entry(name, Extent(start, size), crc32), after


def _entries(data: mmap.mmap) -> list[Entry]:
    at, size, count = _directory(data)
    end = at + size
    entries: list[Entry] = []
    try:
        for _ in range(count):
            entry, at = _entry(data, at, end)
            entries.append(entry)
    except (struct.error, ValueError, StopIteration) as error:
        raise FormatError(_TRUNCATED) from error
    if at != end:
        raise FormatError(_TRUNCATED)
    names = Counter(entry.name for entry in entries)
    for name, times in names.most_common(1):
        if times > 1:
            raise FormatError(f"is refused: its zip entry {quote(name)} is there twice; {_TRUSTED}")
    end_of_last = 0
    for entry in sorted(entries, key=lambda entry: entry.extent):
        if entry.extent.offset < end_of_last:
            raise FormatError(
                f"is refused: its zip entry {quote(entry.name)} overlaps another; {_TRUSTED}"
            )
        end_of_last = entry.extent.offset + entry.extent.num_bytes
    return entries


def read_archive(data: mmap.mmap) -> Archive:
    """Reads the directory of an archive by `torch.save`.

    Args:
      data: the mapped file. Its storages are not touched.

    Returns:
      Where the pickle and the storages lie; every entry lies within the file, apart from the
      others, and the pickle's CRC is right.

    Raises:
      FormatError: if it is damaged, or an archive of another kind.
    """
    entries = _entries(data)
    by_name = {entry.name: entry for entry in entries}
    pickle = next((e for e in entries if f"/{e.name}".endswith("/data.pkl")), None)
    if any(name.endswith("/constants.pkl") for name in by_name) or any(
        "/code/" in f"/{name}" for name in by_name
    ):
        raise FormatError(
            "is a TorchScript archive, which is code; in PyTorch, save "
            "torch.jit.load(path).state_dict() with torch.save"
        )
    if pickle is None or pickle.name.count("/") > 1:
        advice = "give a file by torch.save, or .safetensors"
        if any(name.endswith(".npy") for name in by_name):
            raise FormatError(f"is a NumPy .npz archive, not PyTorch's; {advice}")
        if any(name.endswith((".pth", ".pt", ".bin", ".safetensors")) for name in by_name):
            raise FormatError("is a zip archive that holds a weights file; unpack it first")
        raise FormatError(f"is a zip archive without PyTorch's data.pkl; {advice}")
    folder = pickle.name.removesuffix("data.pkl")
    if pickle.extent.num_bytes > _LARGEST_PICKLE:
        raise FormatError(
            f"is refused: its pickle of {pickle.extent.num_bytes:,} bytes is far larger than "
            f"weights need; {_TRUSTED}"
        )
    order = by_name.get(f"{folder}byteorder")
    if order is not None and _bytes(data, order, 16).strip() != b"little":
        raise FormatError(
            "was written on a big-endian machine, which is not read; in PyTorch, load it and save "
            "it again on a little-endian one"
        )
    if pickle.crc32 and zlib.crc32(_bytes(data, pickle, _LARGEST_PICKLE)) != pickle.crc32:
        raise FormatError("is damaged: its pickle's checksum is wrong; download it again")
    prefix = f"{folder}data/"
    storages = {
        entry.name.removeprefix(prefix): entry.extent
        for entry in entries
        if entry.name.startswith(prefix)
    }
    return Archive(pickle, storages, tuple(entries))


def _bytes(data: mmap.mmap, entry: Entry, limit: int) -> bytes:
    offset, size = entry.extent
    return data[offset : offset + min(size, limit)]


def pickle_of(data: mmap.mmap, archive: Archive) -> Cursor:
    """The archive's pickle, from its first byte."""
    offset, size = archive.pickle.extent
    return Cursor(data, offset, offset + size)
