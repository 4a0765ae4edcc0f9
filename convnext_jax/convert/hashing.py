"""A file's SHA-256, and the checksums of its zip entries in the same pass."""

import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from convnext_jax.convert.torch_zip import Entry

_CHUNK = 2**20

# torch.hub's rule: torchvision and timm's releases end a name in the first digits of the hash. A
# date has eight digits too, so at least one must be a letter.
_NAMED_HASH = re.compile(r"convnext\w*-(?=\d*[a-f])([0-9a-f]{8})\.pth")


def named_hash(name: str) -> str | None:
    """The first eight hexadecimal digits of the SHA-256 that an official file name promises."""
    match = _NAMED_HASH.fullmatch(name)
    return match[1] if match else None


def digest(path: Path, entries: Sequence[Entry] = ()) -> tuple[str, Entry | None]:
    """Reads a file once, a megabyte at a time.

    Args:
      path: of the file. Reading it, rather than its map, leaves no page in this process's memory.
      entries: parts that state their CRC-32, without overlap; 0 means none is stated.

    Returns:
      (the file's SHA-256 in hexadecimal, the first entry whose CRC-32 is another).
    """
    sha256 = hashlib.sha256()
    waiting = sorted((e for e in entries if e.crc32), key=lambda e: e.extent, reverse=True)
    crc, position = 0, 0
    wrong: Entry | None = None
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            chunk = memoryview(buffer)[:size]
            sha256.update(chunk)
            while waiting:
                entry = waiting[-1]
                begin, end = entry.extent.offset, entry.extent.offset + entry.extent.num_bytes
                if begin >= position + size:
                    break
                crc = zlib.crc32(chunk[max(begin - position, 0) : end - position], crc)
                if end > position + size:
                    break
                if crc != entry.crc32 and wrong is None:
                    wrong = entry
                waiting.pop()
                crc = 0
            position += size
    return sha256.hexdigest(), wrong
