"""Writes PyTorch's two file formats without PyTorch, from what is known of them.

`tests/convert/test_torch_file.py` holds them against files by PyTorch itself, where it is there.
"""

import dataclasses
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


@dataclass(frozen=True)
class View:
    """A tensor on a storage, which is one-dimensional; offset and strides in elements."""

    key: str
    storage: np.ndarray
    offset: int
    shape: tuple
    strides: tuple
    parameter: bool = False
    numel: int | None = None


def tensor(key, array, **changes):
    """A contiguous tensor that has a storage for itself."""
    array = np.asarray(array)
    strides = tuple(s // array.itemsize for s in np.empty(array.shape, array.dtype).strides)
    return dataclasses.replace(View(key, array.ravel(), 0, array.shape, strides), **changes)


def name(module, attribute):
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(function, *arguments):
    return Raw(encode(function) + encode(tuple(arguments)) + b"R")


def instance(module, attribute, state):
    """An object whose attributes are set, as argparse.Namespace is pickled."""
    return Raw(encode(name(module, attribute)) + b")\x81" + encode(state) + b"b")


def _view(view, legacy):
    dtype = view.storage.dtype.name
    numel = view.storage.size if view.numel is None else view.numel
    fields = ("storage", name("torch", STORAGES[dtype]), view.key, "cpu", numel)
    storage = Raw(encode((*fields, None) if legacy else fields) + b"Q")
    hooks = call(name("collections", "OrderedDict"))
    rebuilt = call(
        name("torch._utils", "_rebuild_tensor_v2"),
        storage, view.offset, view.shape, view.strides, False, hooks,
    )  # fmt: skip
    if view.parameter:
        rebuilt = call(name("torch._utils", "_rebuild_parameter"), rebuilt, True, hooks)
    return rebuilt.code


def encode(value, legacy=False):
    """The opcodes of protocol 2 that push a value."""
    match value:
        case Raw():
            return value.code
        case View():
            return _view(value, legacy)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            if -(2**31) <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(encode(v, legacy) for v in value) + b"t"
        case list():
            return b"](" + b"".join(encode(v, legacy) for v in value) + b"e"
        case dict():
            items = b"".join(encode(k) + encode(v, legacy) for k, v in value.items())
            return b"}(" + items + b"u"
    raise TypeError(type(value))


def pickled(value, legacy=False):
    return b"\x80\x02" + encode(value, legacy) + b"."


def storages_of(value, found=None):
    found = {} if found is None else found
    if isinstance(value, View):
        found.setdefault(value.key, value.storage)
    elif isinstance(value, dict):
        for inner in value.values():
            storages_of(inner, found)
    elif isinstance(value, list | tuple):
        for inner in value:
            storages_of(inner, found)
    return found


def write_zip(path, value, *, folder="archive", byteorder="little", replace=None, more=()):
    """Writes the format since 1.6.

    Args:
      path: to write.
      value: dicts, lists and tuples of numbers, strings, `View` and `Raw`.
      folder: the top folder in the archive.
      byteorder: what the entry of that name says; None leaves it out, as PyTorch before 2.1.
      replace: entry -> other bytes for it.
      more: (name, bytes) of further entries.
    """
    entries = [("data.pkl", pickled(value))]
    if byteorder:
        entries.append(("byteorder", byteorder.encode()))
    entries += [(f"data/{key}", array.tobytes()) for key, array in storages_of(value).items()]
    entries.append(("version", b"3\n"))
    entries = [(f"{folder}/{name}" if folder else name, data) for name, data in entries]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in [*entries, *more]:
            info = zipfile.ZipInfo(entry)
            # As PyTorch does, so that each storage begins at a multiple of 64 bytes.
            padding = -(archive.fp.tell() + 30 + len(entry) + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, (replace or {}).get(entry, data))
    return Path(path)


def write_legacy(path, value, *, little_endian=True, keys=None):
    """Writes the format until 1.5."""
    system = {"protocol_version": 1001, "little_endian": little_endian}
    storages = storages_of(value)
    with Path(path).open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            file.write(pickled(part))
        file.write(pickled(value, legacy=True))
        file.write(pickled(list(storages) if keys is None else keys))
        for array in storages.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())
    return Path(path)
