"""Files made to run code, to exhaust memory or to read beyond themselves: each is one sentence."""

import builtins
import dataclasses
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from memory import memory_limit
from safetensors.numpy import save_file
from torch_files import (
    Raw,
    call,
    encode,
    instance,
    name,
    pickled,
    tensor,
    write_legacy,
    write_zip,
)

from convnext_jax.convert.reading import read_weights
from convnext_jax.errors import UserError

ONES = np.ones(4, np.float32)
SENTINEL = "executed"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A directory to run in, in which nothing may appear but the file under test."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path


def refused(path, message):
    """The file ends in one sentence that names it; nothing has been run, nothing written."""
    before = sorted(path.parent.rglob("*"))
    begin = time.monotonic()
    with memory_limit(300e6), pytest.raises(UserError, match=message) as info:
        read_weights(path)
    text = str(info.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < len(str(path)) + 600
    assert sorted(path.parent.rglob("*")) == before
    assert time.monotonic() - begin < 20


class Exploit:
    """An object that the pickle module itself turns into a call."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def in_zip(path, code):
    return write_zip(path, {"w": tensor("0", ONES)}, replace={"archive/data.pkl": code})


def in_legacy(path, code):
    """The legacy format, in which any of the five pickles could be the hostile one."""
    path.write_bytes(pickled(0x1950A86A20F9469CFC6C) + code)
    return path


TOUCH = f"open({SENTINEL!r}, 'w').close()"
EXPLOITS = {
    "posix.system": Exploit(os.system, f"touch {SENTINEL}"),
    "eval": Exploit(builtins.eval, TOUCH),
    "exec": Exploit(builtins.exec, TOUCH),
    "open": Exploit(builtins.open, SENTINEL, "w"),
    "subprocess.Popen": Exploit(subprocess.Popen, ["touch", SENTINEL]),
    "getattr": Exploit(builtins.getattr, Exploit(builtins.__import__, "os"), "system"),
    "__import__": Exploit(builtins.__import__, "os"),
    # The outer callable is harmless, its argument is not.
    "eval ": {"a": [Exploit(dict, Exploit(tuple, Exploit(builtins.eval, TOUCH)))]},
}


@pytest.mark.parametrize("wrap", [in_zip, in_legacy])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("exploit", EXPLOITS)
def test_nothing_is_called(exploit, protocol, wrap, workplace):
    code = pickle.dumps(EXPLOITS[exploit], protocol=protocol)
    refused(wrap(workplace / "w.pth", code), r"its pickle names '[\w.]*'.* nothing of it was run")


def test_the_exploits_would_work():
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(EXPLOITS["eval "], protocol=2))
    assert os.path.exists(SENTINEL)


@pytest.mark.parametrize(
    "function",
    [
        "torch.hub load", "torch load", "torch._utils _import_dotted_name",
        "torch.storage _load_from_bytes", "numpy load", "numpy.testing._private.utils runstring",
        "functools partial", "operator attrgetter", "codecs open", "_codecs lookup",
        "builtins getattr", "pip main", "convnext_jax.cli run", "collections namedtuple",
        "collections OrderedDict.fromkeys", "collections  OrderedDict", "torch", " ",
    ],
)  # fmt: skip
def test_other_globals_are_refused_by_name(function, workplace):
    module, _, attribute = function.partition(" ")
    code = b"\x80\x04" + encode(module) + encode(attribute) + b"\x93."
    shown = re.escape(f"{module}.{attribute}")
    before = module in sys.modules
    refused(in_zip(workplace / "w.pth", code), f"its pickle names '{shown}'")
    assert (module in sys.modules) == before


ORDERED = name("collections", "OrderedDict")
TENSOR_V2 = name("torch._utils", "_rebuild_tensor_v2")
STORAGE = Raw(encode(("storage", name("torch", "FloatStorage"), "0", "cpu", 4)) + b"Q")


@pytest.mark.parametrize(
    "code",
    {
        "calls a string": encode("os.system") + encode(("touch executed",)) + b"R",
        "calls a dict": encode({}) + b")R",
        "calls a constant": encode(call(name("torch", "float32"))),
        "calls a storage class": encode(call(name("torch", "FloatStorage"), 10**9)),
        "calls without a tuple": encode(ORDERED) + encode({}) + b"R",
        "tensor on no storage": encode(call(TENSOR_V2, "0", 0, (4,), (1,), False, {})),
        "parameter of no tensor": encode(
            call(name("torch._utils", "_rebuild_parameter"), 3, True, {})
        ),
        "type of any function": encode(
            call(name("torch._tensor", "_rebuild_from_type_v2"), ORDERED, 0, (), {})
        ),
        "state of a string": encode("a") + encode({"__class__": 3}) + b"b",
        "state of a function": encode(ORDERED) + encode({"__code__": 3}) + b"b",
        "state of a tuple": b")" + encode({"a": 3}) + b"b",
        "state of a tensor": encode(call(TENSOR_V2, STORAGE, 0, (4,), (1,))) + encode({}) + b"b",
        "append to a dict": b"}Na",
        "items of a list": b"]NNs",
        "an unknown memo entry": b"h\x05",
        "nothing on the stack": b"s",
        "no mark": b"t",
        "two results": b"NN",
        "an open mark": b"N(N",
        "odd items": b"}(Nu",
        "storage of a negative length": encode(
            ("storage", name("torch", "FloatStorage"), "0", "cpu", -4)) + b"Q",
        "storage of a huge length": encode(
            ("storage", name("torch", "FloatStorage"), "0", "cpu", 2**62)) + b"Q",
        "storage of no type": encode(("storage", "FloatStorage", "0", "cpu", 4)) + b"Q",
        "a reference of one": encode(("storage",)) + b"Q",
        "a reference by text": b"Pos\n",
        "a reference to a list": encode([[], []]) + b"Q",
        "broken text": b"X\x02\0\0\0\xff\xff",
        "not ASCII": b"c\xff\xfe\nx\n",
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [in_zip, in_legacy])
def test_opcodes_that_make_no_sense(code, wrap, workplace):
    refused(wrap(workplace / "w.pth", b"\x80\x02" + code[1] + b"."), "is damaged|is refused")


@pytest.mark.parametrize(
    ("opcode", "code"),
    {
        "INST": b"(ios\nsystem\n", "OBJ": b"(" + encode(ORDERED) + b"o", "EXT1": b"\x82\x01",
        "EXT4": b"\x84\x01\0\0\0", "DUP": b"N2", "POP": b"N0", "NEXT_BUFFER": b"\x97",
        "STRING": b"S'\\q'\n", "INT": b"I" + b"9" * 900 + b"\n", "PUT": b"Np1\n",
    }.items(),
)  # fmt: skip
def test_opcodes_that_pytorch_does_not_write(opcode, code, workplace):
    message = f"opcode {opcode} at byte"
    refused(in_zip(workplace / "w.pth", b"\x80\x02" + code + b"."), message)


def repeat(prefix, code, times, suffix=b""):
    return b"\x80\x02" + prefix + code * times + suffix + b"."


BOMBS = {
    "memo": (repeat(b"N", b"r\xff\xff\xff\xff", 1, b"r\xff\xff\xff\x7f"), "no state dict"),
    "length": (repeat(b"", b"\x8e" + struct.pack("<Q", 2**62), 1), "is truncated"),
    "bytearray": (repeat(b"", b"\x96" + struct.pack("<Q", 2**40), 1), "is truncated"),
    "frame": (repeat(b"\x95" + struct.pack("<Q", 2**62), b"N", 1), "no state dict"),
    "integer": (repeat(b"\x8b" + struct.pack("<i", 10**6), b"\x7f", 10**6), "of 7999999 bits"),
    "dicts": (repeat(b"(", b"}", 600_000, b"t"), "more than 500,000 steps"),
    "depth": (repeat(b"", b"(", 200_000, b"t" * 200_000), "no state dict"),
    "deep tuples": (repeat(b"N", b"\x85", 400_000), "no state dict"),
    # Hashed, such a tuple overflows the C stack.
    "deep key": (repeat(b"}N", b"\x85", 400_000, b"Ns"), "holds no tensors"),
    "itself": (repeat(b"]q\0", b"h\0a", 10), "no state dict"),
    "laughs": (repeat(b"(]q\0", b"(" + b"h\0" * 9 + b"tq\0", 20, b"t"), "no state dict"),
    "in itself": (repeat(b"}q\0", encode("model") + b"h\0s", 1), "holds no tensors"),
    "copies": (
        repeat(encode([[str(i), 0] for i in range(20_000)]) + b"q\0" + encode(ORDERED) + b"q\x01",
               b"h\x01h\0\x85R", 1000),
        "more than 500,000 steps",
    ),
    "arguments": (
        repeat(
            encode(name("torch._utils", "_rebuild_parameter")) + b"q\0("
            + encode(call(TENSOR_V2, STORAGE, 0, (4,), (1,))) + b"N" * 100_000 + b"tq\x01R",
            b"", 0,
        ),
        "makes no sense",
    ),
    "colliding keys": (
        repeat(b"}", b"".join(encode(i * (2**61 - 1)) + b"Ns" for i in range(20_000)), 1),
        "holds no tensors",
    ),
    "terminal escapes": (repeat(b"}", encode("\x1b[2J\n\ud800" * 99) + b"Ns", 1), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb, workplace):
    code, message = BOMBS[bomb]
    refused(in_zip(workplace / "w.pth", code), message)


GOOD = tensor("0", ONES)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (5,)}, r"'w' of shape \(5,\) reaches past its storage, to element 4 of 4"),
        ({"offset": 1}, "reaches past its storage"),
        ({"offset": 2**47}, "reaches past its storage"),
        ({"strides": (2,)}, "reaches past its storage"),
        ({"offset": -1}, "not a whole number from 0 on"),
        ({"strides": (-1,), "offset": 3}, "not a whole number from 0 on"),
        ({"shape": (-4,)}, "not a whole number from 0 on"),
        ({"shape": (4.0,)}, "not a whole number from 0 on"),
        ({"shape": (True,)}, "not a whole number from 0 on"),
        ({"shape": (2, 2)}, "not a whole number from 0 on"),
        ({"shape": 4}, "not a whole number from 0 on"),
        ({"shape": (2**63,)}, "not a whole number from 0 on"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "not a whole number from 0 on"),
        ({"shape": (2**40,), "strides": (0,)}, "repeats the 4 elements"),
        ({"shape": (2**30,) * 30, "strides": (0,) * 30}, "repeats the 4 elements"),
        ({"shape": (4, 4), "strides": (0, 1)}, "repeats the 4 elements"),
        ({"shape": (3, 2), "strides": (1, 1)}, "repeats the 4 elements"),
        ({"shape": (2**40, 0, 2**40), "strides": (1, 1, 1)}, "reaches past|repeats"),
    ],
)
def test_tensors_outside_their_storage(changes, message, write, workplace):
    path = write(workplace / "w.pth", {"w": dataclasses.replace(GOOD, **changes)})
    refused(path, message)


@pytest.mark.parametrize("numel", [3, 5, 2**40])
def test_storages_of_another_length(numel, workplace):
    state = {"w": dataclasses.replace(GOOD, numel=numel)}
    message = rf"'w' is on a storage of 16 bytes, which should have {4 * numel};"
    refused(write_zip(workplace / "z.pth", state), message)
    message = f"'0' has 4 elements where its tensors expect {numel};"
    refused(write_legacy(workplace / "l.pth", state), message)


def test_an_entry_past_the_end_of_the_file(workplace):
    count = 2**18
    state = {"w": dataclasses.replace(GOOD, numel=count, shape=(count,))}
    path = write_zip(workplace / "w.pth", state)
    data = bytearray(path.read_bytes())
    at = central_record(data, "archive/data/0")
    data[at + 20 : at + 28] = struct.pack("<LL", 4 * count, 4 * count)
    path.write_bytes(data)
    refused(path, "entry 'archive/data/0' reaches past the end")


def test_many_tensors_on_one_storage(workplace):
    big = tensor("0", np.ones(1000, np.float32))
    path = write_zip(workplace / "w.pth", {str(i): big for i in range(400)})
    refused(path, "lie on top of each other and claim 1,600,000 bytes")


def test_storages_that_are_not_there(workplace):
    lost = Raw(encode(("storage", name("torch", "FloatStorage"), "7", "cpu", 4)) + b"Q")
    state = {"w": GOOD, "v": call(TENSOR_V2, lost, 0, (4,), (1,))}
    refused(write_zip(workplace / "z.pth", state), "on the storage '7', which the file does not")
    refused(write_legacy(workplace / "l.pth", state), "on the storage '7', which the file does not")
    two = Raw(encode(("storage", name("torch", "DoubleStorage"), "0", "cpu", 4)) + b"Q")
    state = {"w": GOOD, "v": call(TENSOR_V2, two, 0, (4,), (1,))}
    refused(write_zip(workplace / "z.pth", state), "its storage '0' has two lengths")
    refused(write_legacy(workplace / "l.pth", {"w": GOOD}, keys=["0", "0"]), "names '0' twice")
    refused(write_legacy(workplace / "l.pth", {"w": GOOD}, keys=["../x"]), "without any tensor")
    refused(write_legacy(workplace / "l.pth", {"w": GOOD}, keys={"a": 1}), "no list of storages")


def test_a_hostile_optimizer_is_not_looked_into(workplace):
    wild = dataclasses.replace(tensor("1", ONES), shape=(2**40,), strides=(0,))
    path = write_zip(workplace / "w.pth", {"model": {"w": GOOD}, "optimizer": {"state": wild}})
    assert list(read_weights(path).tensors) == ["w"]


def test_compressed_entries(workplace):
    path = workplace / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"w": tensor("0", ONES)}))
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    refused(path, r"entry 'archive/data.pkl' is compressed, .* `zip -0 -r`")


@pytest.mark.parametrize(
    "entry",
    ["archive/../../evil", "/etc/passwd", "..\\evil", "C:evil", "archive/data/../../../evil"],
)
def test_names_that_point_out_of_the_archive(entry, workplace):
    path = write_zip(workplace / "w.pth", {"w": GOOD}, more=[(entry, b"x")])
    refused(path, "points out of the archive")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(workplace):
    path = write_zip(workplace / "w.pth", {"w": GOOD}, more=[("archive/data/0", b"x" * 16)])
    refused(path, "'archive/data/0' is there twice")


def test_links_and_encryption(workplace):
    path = write_zip(workplace / "w.pth", {"w": GOOD})
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("archive/data/1")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, b"/etc/passwd")
    refused(path, "'archive/data/1' is a symbolic link")
    data = bytearray(write_zip(path, {"w": GOOD}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "is encrypted")


def central_record(data, entry):
    """Where the directory describes an entry."""
    records = (match.start() for match in re.finditer(b"PK\x01\x02", bytes(data)))
    return next(at for at in records if data[at + 46 :].startswith(entry.encode()))


def test_entries_that_overlap(workplace):
    """As a zip bomb without compression does: one entry lies within another, header and all."""
    header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 16, 16, 14, 0)
    inner = np.frombuffer(header + b"archive/data/1" + ONES.tobytes(), np.uint8)
    state = {"a": tensor("0", inner), "b": tensor("1", ONES)}
    path = write_zip(workplace / "w.pth", state)
    data = bytearray(path.read_bytes())
    at = central_record(data, "archive/data/1")
    data[at + 42 : at + 46] = struct.pack("<L", data.index(header))
    path.write_bytes(data)
    refused(path, "'archive/data/1' overlaps another")
    other = central_record(data, "archive/data/0")
    data[at + 42 : at + 46] = data[other + 42 : other + 46]
    path.write_bytes(data)
    refused(path, "has another name where its bytes are")


def test_directories_that_claim_too_much(workplace):
    path = write_zip(workplace / "w.pth", {"w": GOOD})
    sound = path.read_bytes()
    for field, size in ((10, 2), (12, 4), (16, 4)):
        data = bytearray(sound)
        at = len(data) - 22 + field
        data[at : at + size] = b"\xff" * size
        path.write_bytes(data)
        refused(path, "zip directory cannot be read")


@pytest.mark.parametrize("write", [write_zip, write_legacy, "safetensors"])
def test_truncated_anywhere(write, workplace):
    path = workplace / "w.pth"
    if write == "safetensors":
        save_file({"w": ONES, "v": ONES}, path)
    else:
        write(path, {"w": GOOD, "v": tensor("1", ONES)})
    sound = path.read_bytes()
    for size in range(0, len(sound), 7):
        path.write_bytes(sound[:size])
        with pytest.raises(UserError) as info:
            read_weights(path)
        assert str(info.value).startswith(str(path))


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def _header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 2**62) + b"{}", "bytes"),
        (struct.pack("<Q", 100_000_000) + b"{" + b" " * 99, "is truncated or damaged"),
        (_header(w={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), "is truncated"),
        (_header(w={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}) + bytes(16),
         "is truncated or damaged"),
        (_header(w={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}), "damaged"),
        (_header(w={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                 v={"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}) + bytes(24), "damaged"),
        (_header(w={"dtype": "F32", "shape": [-4], "data_offsets": [0, 8]}) + bytes(8), "damaged"),
        (_header(w={"dtype": "O", "shape": [1], "data_offsets": [0, 8]}) + bytes(8), "damaged"),
        (_header(w=ENTRY, v=ENTRY).replace(b'"v"', b'"w"') + bytes(16), "damaged"),
        (struct.pack("<Q", 9000) + b"{" + b'"a":{' * 1799 + b"    ", "damaged"),
    ],
)  # fmt: skip
def test_safetensors_that_lie(content, message, workplace):
    path = workplace / "w.safetensors"
    path.write_bytes(content)
    refused(path, message)


def test_options_of_an_unknown_class_are_refused_by_name(workplace):
    options = instance("yacs.config", "CfgNode", {"a": 1})
    path = write_zip(workplace / "w.pth", {"model": {"w": GOOD}, "config": options})
    refused(path, r"its pickle names 'yacs\.config\.CfgNode', .* save the state dict alone")
