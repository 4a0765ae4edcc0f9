"""Tensors come out of PyTorch's files as they went in: written here, and by PyTorch itself."""

import argparse

import ml_dtypes
import numpy as np
import pytest
from torch_files import STORAGES, Raw, call, encode, instance, name, tensor, write_legacy, write_zip

from convnext_jax.convert import torch_tensors
from convnext_jax.convert.reading import read_weights
from convnext_jax.errors import UserError

WRITERS = {"zip": write_zip, "legacy": write_legacy}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def values(dtype, count=12):
    return (np.arange(count) * 0.37 - 1).astype(dtype)


def test_every_dtype_is_kept(write, tmp_path):
    state = {
        dtype: tensor(str(i), values(np.dtype(dtype)).reshape(3, 4))
        for i, dtype in enumerate(STORAGES)
    }
    read = read_weights(write(tmp_path / "w.pth", state))
    assert list(read.tensors) == list(state)
    for dtype, array in read.tensors.items():
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array, values(np.dtype(dtype)).reshape(3, 4))
        assert not array.flags.writeable


def test_views_and_shared_storages_stay_views(write, tmp_path):
    base = tensor("0", values(np.float32, 24).reshape(4, 6))
    state = {
        "whole": base,
        "tied": base,
        "transposed": tensor("0", base.storage, shape=(6, 4), strides=(1, 6)),
        "column": tensor("0", base.storage, offset=2, shape=(4,), strides=(6,)),
        "scalar": tensor("0", base.storage, offset=23, shape=(), strides=()),
        "empty": tensor("0", base.storage, shape=(0, 6), strides=(6, 1)),
        "repeated": tensor("0", base.storage, shape=(4, 6), strides=(0, 1)),
        "parameter": tensor("1", np.ones((2,), np.float32), parameter=True),
    }
    read = read_weights(write(tmp_path / "w.pth", state)).tensors
    whole = values(np.float32, 24).reshape(4, 6)
    np.testing.assert_array_equal(read["whole"], whole)
    np.testing.assert_array_equal(read["transposed"], whole.T)
    np.testing.assert_array_equal(read["column"], whole[:, 2])
    assert read["scalar"].shape == ()
    assert read["scalar"] == whole[3, 5]
    assert read["empty"].shape == (0, 6)
    np.testing.assert_array_equal(read["repeated"], np.tile(whole[:1], (4, 1)))
    np.testing.assert_array_equal(read["parameter"], [1, 1])
    assert np.shares_memory(read["tied"], read["transposed"])


def test_a_training_file_of_the_authors(write, tmp_path):
    numpy_scalar = call(
        name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), "f8", 0, 1), "8 bytes"
    )
    step = tensor("s", np.float32(3))
    content = {
        "model": {"w": tensor("0", values(np.float32))},
        "optimizer": {
            "state": {"0": {"step": step}},
            "param_groups": [{"lr": 4e-3, "betas": (1,)}],
        },
        "epoch": 299,
        "scaler": {"scale": 65536.0, "growth_tracker": 2**70},
        "args": instance("argparse", "Namespace", {"lr": 4e-3, "device": "cuda", "drop": None}),
        "max_accuracy": numpy_scalar,
        "device": call(name("torch", "device"), "cuda", 0),
        "model_ema": {"w": tensor("1", values(np.float32) + 1)},
    }
    read = read_weights(write(tmp_path / "checkpoint.pth", content))
    np.testing.assert_array_equal(read.tensors["w"], values(np.float32) + 1)
    assert read.metadata["group"] == "model_ema"
    assert read.metadata["format"] == f"torch-{'zip' if write is write_zip else 'legacy'}"


def test_storage_views_of_early_versions(tmp_path):
    whole = values(np.float32)
    fields = ("storage", name("torch", "FloatStorage"), "0", "cpu", 12, ("1", 4, 6))
    part = Raw(encode(fields) + b"Q")
    view = call(name("torch._utils", "_rebuild_tensor"), part, 1, (2,), (3,))
    path = write_legacy(tmp_path / "w.pth", {"whole": tensor("0", whole), "part": view})
    np.testing.assert_array_equal(read_weights(path).tensors["part"], whole[[5, 8]])
    longer = Raw(encode((*fields[:-1], ("1", 8, 6))) + b"Q")
    for storage, stride in ((part, 5), (longer, 1)):
        beyond = call(name("torch._utils", "_rebuild_tensor"), storage, 1, (2,), (stride,))
        path = write_legacy(tmp_path / "w.pth", {"whole": tensor("0", whole), "part": beyond})
        with pytest.raises(UserError, match=r"tensor 'part' .* reaches past its storage"):
            read_weights(path)


def test_state_dicts_by_python_2(write, tmp_path):
    pairs = [["w", tensor("0", values(np.float32))], ["v", tensor("0", values(np.float32))]]
    state = Raw(encode(name("collections", "OrderedDict")) + encode((pairs,), True) + b"R")
    path = write(tmp_path / "w.pth", {"state_dict": state, "_": tensor("0", values(np.float32))})
    read = read_weights(path)
    assert list(read.tensors) == ["w", "v"]
    assert read.metadata["group"] == "state_dict"


def test_archives_without_byte_order_or_folder(tmp_path):
    state = {"w": tensor("0", values(np.float32))}
    for number, options in enumerate(({"byteorder": None}, {"folder": ""}, {"folder": "a b.c"})):
        read = read_weights(write_zip(tmp_path / f"{number}.pth", state, **options))
        np.testing.assert_array_equal(read.tensors["w"], values(np.float32))


def test_big_endian_files_are_refused(tmp_path):
    state = {"w": tensor("0", values(np.float32))}
    for path in (
        write_zip(tmp_path / "z.pth", state, byteorder="big"),
        write_legacy(tmp_path / "l.pth", state, little_endian=False),
    ):
        with pytest.raises(UserError, match="big-endian"):
            read_weights(path)


def test_a_wrong_checksum_is_found_wherever_it_is(tmp_path):
    # More than a chunk of the reader's, so that an entry reaches over its border.
    state = {str(i): tensor(str(i), np.full(300_000, i, np.float32)) for i in range(4)}
    path = write_zip(tmp_path / "w.pth", state)
    sound = path.read_bytes()
    assert len(read_weights(path).tensors) == 4
    for key in range(4):
        damaged = bytearray(sound)
        damaged[sound.index(np.full(100, key, np.float32).tobytes()) + 1_000_001] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"checksum of its entry 'archive/data/{key}'"):
            read_weights(path)


def assert_same(torch, expected, actual):
    """Bit for bit, since bfloat16 has no NumPy of PyTorch's own."""
    assert sorted(expected) == sorted(actual)
    for key, tensor_ in expected.items():
        assert tuple(tensor_.shape) == actual[key].shape, key
        ours = np.ascontiguousarray(actual[key])
        theirs = tensor_.detach().contiguous()
        as_bytes = theirs.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert str(theirs.dtype).removeprefix("torch.") == ours.dtype.name, key
        assert ours.tobytes() == as_bytes, key


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_by_pytorch(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {
        **model.state_dict(),
        "base": base,
        "transposed": base.T,
        "slice": base[1:4, ::3],
        "tied": torch.nn.Parameter(base),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "with_attribute": torch.nn.Parameter(torch.ones(3)),
    }
    state["with_attribute"].note = "kept by PyTorch since 2.0"
    for name_ in torch_tensors.DTYPES:
        dtype = name_.removeprefix("torch ")
        state[dtype] = torch.arange(5).to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = {
        "model": {"w": torch.zeros(1)},
        "model_ema": state,
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=4e-3, device=torch.device("cpu"), sizes=[1, 2], name="x"),
        "max_accuracy": np.float64(82.1),
        "history": np.arange(3),
        "rng": torch.get_rng_state(),
        "dtype": torch.bfloat16,
        "shape": torch.Size([1, 2]),
        "notes": {1, 2},
        "raw": b"bytes",
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_weights(path)
    assert read.metadata["group"] == "model_ema"
    assert_same(torch, state, read.tensors)
    assert read.tensors["bfloat16"].dtype == ml_dtypes.bfloat16


@pytest.mark.parity
def test_our_files_are_pytorchs(write, tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        dtype: tensor(str(i), values(np.dtype(dtype)), parameter=i == 1)
        for i, dtype in enumerate(STORAGES)
    }
    path = write(tmp_path / "w.pth", state)
    theirs = torch.load(path, weights_only=True)
    assert_same(torch, theirs, read_weights(path).tensors)


@pytest.mark.parity
def test_pytorch_without_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(5)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(read_weights(tmp_path / "w.pth").tensors["w"], np.ones(5))
