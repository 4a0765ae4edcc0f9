"""A memory-mapped file, read from a position on."""

import mmap
from pathlib import Path

import numpy as np

from convnext_jax.convert.format_error import FormatError

# Globals and tokens that end with a line break are names; no name is longer.
_LONGEST_LINE = 1024


def map_file(path: Path) -> mmap.mmap:
    """Maps a file, read-only. It must not be shortened while arrays on it are in use."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release_pages(array: np.ndarray) -> None:
    """Lets go of the memory that a view of a mapped file holds; it is read anew when wanted.

    What a program has looked at stays in its memory as long as there is room, and counts as its
    own. A conversion would seem to hold all of the file besides what it writes.

    Args:
      array: a view, however derived. One that is of no mapped file is left alone.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class Cursor:
    """The `read` and `readline` of a binary file over bytes [position, end) of a mapped one.

    Never returns less than what was asked for, and copies nothing else.
    """

    def __init__(self, data: mmap.mmap, position: int, end: int):
        self._data = data
        self.position = position
        self._end = end

    def read(self, size: int) -> bytes:
        """The next `size` bytes; a `FormatError` where they are not all there."""
        stop = self.position + size
        if size < 0 or stop > self._end:
            raise FormatError(
                f"is truncated or damaged: {size} bytes should follow byte {self.position}; "
                "download it again"
            )
        piece = self._data[self.position : stop]
        self.position = stop
        return piece

    def readline(self) -> bytes:
        """The bytes up to and with the next line feed."""
        limit = min(self._end, self.position + _LONGEST_LINE)
        found = self._data.find(b"\n", self.position, limit)
        if found < 0:
            raise FormatError(
                f"is truncated or damaged: no name ends after byte {self.position}; "
                "download it again"
            )
        return self.read(found + 1 - self.position)
