"""Mutated files of all formats: each is read soundly or refused in one sentence, nothing else."""

import io
import pickletools
import random
import re
import struct
import time
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
from memory import memory_limit
from safetensors.numpy import save
from torch_files import instance, tensor, write_legacy, write_zip

from convnext_jax.convert.reading import read_weights
from convnext_jax.errors import UserError

MUTANTS = 4000
SEED = 20220110


def content():
    base = tensor("0", np.arange(24, dtype=np.float32).reshape(4, 6))
    return {
        "model": {
            "a.weight": base,
            "a.bias": tensor("1", np.arange(5).astype("float16"), parameter=True),
            "a.view": tensor("0", base.storage, offset=1, shape=(2, 3), strides=(6, 2)),
            "steps": tensor("2", np.array(7)),
        },
        "optimizer": {"state": {"exp_avg": tensor("3", np.ones(5, np.float32))}, "lr": [4e-3]},
        "epoch": 299,
        "args": instance("argparse", "Namespace", {"lr": 4e-3, "seed": 2**40}),
    }


def flip(rng, data):
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng, data):
    at = rng.randrange(len(data))
    values = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), rng.getrandbits(64))
    size = rng.choice((1, 2, 4, 8))
    data[at : at + size] = (rng.choice(values) % 2 ** (8 * size)).to_bytes(size, "little")


def truncate(rng, data):
    del data[rng.randrange(len(data)) :]


def splice(rng, data):
    begin, end = sorted(rng.randrange(len(data)) for _ in range(2))
    piece = data[begin : min(end, begin + 200)]
    at = rng.randrange(len(data))
    data[at : at + rng.choice((0, len(piece)))] = piece


def delete(rng, data):
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 3, 8, 64))]


BYTE_MUTATIONS = (flip, overwrite, truncate, splice, delete)
OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]


def mutate_opcodes(rng, code):
    """Another pickle of whole opcodes: some left out, repeated, swapped, or of other arguments."""
    starts = [at for _, _, at in pickletools.genops(code)]
    ops = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    numbers = [i for i, op in enumerate(ops) if op[:1] == b"J"]
    texts = [i for i, op in enumerate(ops) if op[:1] == b"X"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, j = rng.randrange(len(ops)), rng.randrange(len(ops))
        match rng.randrange(8):
            case 0:
                ops[i] = b""
            case 1:
                ops.insert(i, ops[j])
            case 2:
                ops[i], ops[j] = ops[j], ops[i]
            case 3:
                ops[i] = rng.choice(OPCODES) + ops[i][1:]
            case 4:
                ops.insert(i, rng.choice(OPCODES) + rng.randbytes(rng.randrange(6)))
            case 5:
                number = rng.choice((-1, 0, 1, 2, 3, 5, 6, 23, 24, 2**31 - 1))
                ops[rng.choice(numbers)] = b"J" + struct.pack("<i", number)
            case 6:
                number = struct.pack("<q", rng.choice((2**47, 2**62, -(2**63))))
                ops[rng.choice(numbers)] = b"\x8a\x08" + number
            case 7:
                ops[rng.choice(texts)] = ops[rng.choice(texts)]
    return b"".join(ops)


def rezip(data, code):
    """The archive with another pickle, its checksums right, so that the pickle is looked into."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    entries["archive/data.pkl"] = code
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(zipfile.ZipInfo(name), entry)
    return result.getvalue()


def restore_checksums(data):
    """Most mutants of an archive would end at its checksums; half of them have these put right."""
    at = data.find(b"PK\x01\x02")
    while at >= 0 and at + 46 <= len(data):
        size, local = (
            *struct.unpack_from("<L", data, at + 24),
            *struct.unpack_from("<L", data, at + 42),
        )
        if local + 30 <= len(data):
            name, extra = struct.unpack_from("<HH", data, local + 26)
            begin = local + 30 + name + extra
            data[at + 16 : at + 20] = struct.pack("<L", zlib.crc32(data[begin : begin + size]))
        at = data.find(b"PK\x01\x02", at + 46)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    archive = write_zip(folder / "zip.pth", content())
    legacy = write_legacy(folder / "legacy.pth", content())
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float16)}
    tensors = save(arrays, {"format": "np"})
    with zipfile.ZipFile(archive) as file:
        code = file.read("archive/data.pkl")
    return {"zip": archive.read_bytes(), "legacy": legacy.read_bytes(), "safetensors": tensors,
            "code": code}  # fmt: skip


def mutant(rng, kind, originals):
    if kind == "opcodes":
        return rezip(originals["zip"], mutate_opcodes(rng, originals["code"]))
    data = bytearray(originals[kind])
    for _ in range(rng.choice((1, 1, 1, 3))):
        if data:
            rng.choice(BYTE_MUTATIONS)(rng, data)
    if kind == "zip" and rng.random() < 0.5:
        restore_checksums(data)
    return data


def assert_sound(read, path):
    """Every element can be read, and there are no more of them than the file may hold."""
    assert read.tensors
    assert read.num_bytes == path.stat().st_size
    for name, array in read.tensors.items():
        assert isinstance(name, str)
        assert not array.flags.writeable
        assert array.nbytes <= path.stat().st_size
        assert all(stride >= 0 for stride in array.strides)
        zlib.crc32(array.tobytes())


def test_the_memory_limit_bites():
    with memory_limit(200e6), pytest.raises(MemoryError):
        bytearray(10**9)


def test_mutants(originals, tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "mutant.pth"
    outcomes = Counter()
    sentences = Counter()
    slowest = 0.0
    with memory_limit(400e6):
        for number in range(MUTANTS):
            kind = ("zip", "legacy", "safetensors", "opcodes")[number % 4]
            # A new file: overwriting one makes some file systems wait for the disk.
            path.unlink(missing_ok=True)
            path.write_bytes(mutant(rng, kind, originals))
            begin = time.monotonic()
            sentence = ""
            try:
                assert_sound(read_weights(path), path)
            except UserError as error:
                sentence = str(error)
            except BaseException:
                print(f"mutant {number}, of {kind}")
                raise
            outcomes[kind, "refused" if sentence else "read"] += 1
            if sentence:
                assert sentence.startswith(f"{path} ")
                assert "\n" not in sentence
                sentences[re.split("[:';]| the bytes", sentence.removeprefix(f"{path} "))[0]] += 1
            slowest = max(slowest, time.monotonic() - begin)
    print(f"\n{MUTANTS} mutants, the slowest took {slowest * 1e3:.0f} ms")
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:12} {outcome:8} {count}")
    for sentence, count in sentences.most_common(25):
        print(f"{count:5} … {sentence}")
    assert sum(outcomes.values()) == MUTANTS
    assert slowest < 5
    # A mutation that harms nothing, as in another number, must not be refused without a reason.
    for kind in ("zip", "legacy", "safetensors", "opcodes"):
        assert outcomes[kind, "read"] > 10
        assert outcomes[kind, "refused"] > 100
    assert [p.name for p in tmp_path.iterdir()] == ["mutant.pth"]
