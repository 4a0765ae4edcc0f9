"""What a file is, by its first bytes; what cannot hold weights is refused with advice."""

from enum import Enum
from pathlib import Path

from convnext_jax.convert.format_error import FormatError


class Kind(Enum):
    """The formats that are read."""

    TORCH_ZIP = "torch-zip"
    TORCH_LEGACY = "torch-legacy"
    SAFETENSORS = "safetensors"


_AGAIN = "; download it again"
_NO_WEIGHTS = ", not a weights file; give a .pth, .pt, .bin or .safetensors file"

# (offset, bytes found there, how the sentence goes on).
_KNOWN = (
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the weights; run `git lfs pull`"),
    (0, b"\xff\xd8\xff", "is a JPEG image" + _NO_WEIGHTS),
    (0, b"\x89PNG", "is a PNG image" + _NO_WEIGHTS),
    (0, b"GIF8", "is a GIF image" + _NO_WEIGHTS),
    (0, b"RIFF", "is a RIFF (WebP) file" + _NO_WEIGHTS),
    (0, b"\x89HDF", "is an HDF5 file (Keras?)" + _NO_WEIGHTS),
    (0, b"\x93NUMPY", "is a single NumPy array" + _NO_WEIGHTS),
    (0, b"\x1f\x8b", "is compressed by gzip; unpack it with `gunzip` first"),
    (0, b"BZh", "is compressed by bzip2; unpack it with `bunzip2` first"),
    (0, b"\xfd7zXZ", "is compressed by xz; unpack it with `unxz` first"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it with `unzstd` first"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (0, b"%PDF", "is a PDF document" + _NO_WEIGHTS),
    (0, b"PK\x05\x06", "is an empty zip archive" + _AGAIN),
    (
        257,
        b"ustar",
        "is a tar archive, which holds files (or weights by PyTorch 0.1, too old to be read); "
        "unpack it and give the weights file inside",
    ),
)

# The long integer that torch.save wrote first until version 1.5, as protocols 2 to 5 pickle it.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def recognise(path: Path) -> Kind:
    """Tells a file's format from its first bytes, whatever its name.

    Args:
      path: of an existing file.

    Returns:
      The format.

    Raises:
      FormatError: if it is none of those read here.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise FormatError("is empty" + _AGAIN)
    if head.startswith(b"PK\x03\x04"):
        return Kind.TORCH_ZIP
    if head[0] == 0x80 and _LEGACY in head[2:32]:
        return Kind.TORCH_LEGACY
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise FormatError(
            "is a plain pickle, not a file by torch.save; save the state dict with torch.save or "
            "as .safetensors"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return Kind.SAFETENSORS
    for offset, magic, reason in _KNOWN:
        if head[offset : offset + len(magic)] == magic:
            raise FormatError(reason)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        raise FormatError(
            "is a web page (HTML or XML), not weights: what was saved is probably a login or an "
            "error page; open its address in a browser and download the file itself"
        )
    if text.startswith((b"{", b"[")):
        raise FormatError("is JSON text" + _NO_WEIGHTS)
    if not head.strip(b"\0"):
        raise FormatError("begins with nothing but zero bytes, as a broken download does" + _AGAIN)
    raise FormatError(f"begins with the bytes {head[:8].hex(' ')}" + _NO_WEIGHTS)
