"""Which tensors of which file: groups, wrappers, shards, hashes, and what is no weights file."""

import hashlib
import json
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from torch_files import tensor, write_legacy, write_zip

from convnext_jax.convert.reading import read_weights
from convnext_jax.errors import UserError


def weight(key="0", value=1.0):
    return tensor(key, np.full((2, 3), value, np.float32))


@pytest.mark.parametrize(
    ("content", "group", "value"),
    [
        ({"w": weight()}, "", 1),
        ({"model": {"w": weight()}}, "model", 1),
        ({"state_dict": {"w": weight()}, "epoch": 3}, "state_dict", 1),
        ({"model": {"w": weight()}, "model_ema": {"w": weight("1", 2)}}, "model_ema", 2),
        ({"state_dict": {"w": weight()}, "state_dict_ema": {"w": weight("1", 2)}},
         "state_dict_ema", 2),
        ({"model": {"w": weight()}, "ema": {"decay": 0.9, "module": {"w": weight("1", 2)}}},
         "ema.module", 2),
        ({"model": {"w": weight()}, "model_ema": None}, "model", 1),
        ({"model": {"w": weight()}, "ema": {"decay": 0.9}}, "model", 1),
        ({"model": {"w": weight()}, "lr": tensor("1", np.float32(3))}, "model", 1),
        ({"backbone": {"w": weight()}, "epoch": 3}, "backbone", 1),
        ({"w": weight(), "epoch": 3, "names": ["a"]}, "", 1),
    ],
)  # fmt: skip
def test_the_group_is_found(content, group, value, tmp_path):
    read = read_weights(write_zip(tmp_path / "w.pth", content))
    assert list(read.tensors) == ["w"]
    assert read.tensors["w"][0, 0] == value
    assert read.metadata["group"] == group


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no tensors, only 'epoch'"),
        ({"model": {}}, "holds no tensors"),
        ({"generator": {"w": weight()}, "critic": {"w": weight("1")}}, "'generator', 'critic'"),
        ([weight()], "holds a list, no state dict"),
        (weight(), "holds a single tensor"),
    ],
)
def test_without_a_group(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_weights(write_zip(tmp_path / "w.pth", content))


def test_a_wrapper_that_all_names_have_is_taken_off(tmp_path):
    two = {"module.a": weight(), "module.b": weight("1")}
    read = read_weights(write_zip(tmp_path / "w.pth", two))
    assert (list(read.tensors), read.metadata["prefix"]) == (["a", "b"], "module.")
    both = {f"_orig_mod.{name}": value for name, value in two.items()}
    read = read_weights(write_zip(tmp_path / "w.pth", both))
    assert (list(read.tensors), read.metadata["prefix"]) == (["a", "b"], "_orig_mod.module.")
    read = read_weights(write_zip(tmp_path / "w.pth", {**two, "c": weight("2")}))
    assert (list(read.tensors), read.metadata["prefix"]) == (["module.a", "module.b", "c"], "")


def test_safetensors(tmp_path):
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.arange(6).astype(ml_dtypes.bfloat16),
        "eight": np.arange(6).astype(ml_dtypes.float8_e4m3fn),
        "odd": np.arange(3, dtype=np.uint8),
        "after_odd": np.arange(4.0).reshape(1, 4, 1),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, {"format": "np"})
    (tmp_path / "config.json").write_text('{"architecture": "convnext_tiny"}')
    (tmp_path / "preprocessor_config.json").write_text('{"crop_pct": 0.9}')
    read = read_weights(path)
    assert read.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read.tensors[name].dtype == array.dtype
        assert not read.tensors[name].flags.writeable
        np.testing.assert_array_equal(read.tensors[name], array)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.num_bytes == path.stat().st_size
    assert read.files == (path,)
    assert read.metadata == {
        "format": "safetensors", "group": "", "prefix": "", "safetensors": {"format": "np"},
        "config": {"architecture": "convnext_tiny"}, "preprocessor_config": {"crop_pct": 0.9},
    }  # fmt: skip


def test_a_directory_prefers_safetensors(tmp_path):
    write_zip(tmp_path / "pytorch_model.bin", {"w": weight()})
    assert read_weights(tmp_path).files == (tmp_path / "pytorch_model.bin",)
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    assert read_weights(str(tmp_path)).files == (tmp_path / "model.safetensors",)


def test_a_directory_with_another_name(tmp_path):
    with pytest.raises(UserError, match="holds no weights file"):
        read_weights(tmp_path)
    write_legacy(tmp_path / "checkpoint.pth", {"w": weight()})
    assert read_weights(tmp_path).metadata["format"] == "torch-legacy"
    write_legacy(tmp_path / "older.pth", {"w": weight()})
    with pytest.raises(UserError, match=r"several weights files, checkpoint\.pth, older\.pth"):
        read_weights(tmp_path)


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request, tmp_path):
    """A checkpoint in two files and an index, as transformers writes large ones."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[request.param]
    names = [f"{stem}-0000{i}-of-00002.{request.param}" for i in (1, 2)]
    for number, name in enumerate(names):
        if request.param == "bin":
            write_zip(tmp_path / name, {f"w{number}": weight(value=number)})
        else:
            array = np.full((2, 3), number, np.float32)
            save_file({f"w{number}": array}, tmp_path / name)
    index = tmp_path / f"{stem}.{request.param}.index.json"
    content = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    index.write_text(json.dumps(content))
    return index


def test_shards(sharded):
    for source in (sharded, sharded.parent):
        read = read_weights(source)
        assert sorted(read.tensors) == ["w0", "w1"]
        assert read.tensors["w1"][0, 0] == 1
        assert len(read.files) == 2
        assert read.num_bytes == sum(path.stat().st_size for path in read.files)
    sums = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in read.files
    )
    assert read.sha256 == hashlib.sha256(sums.encode()).hexdigest()
    assert read_weights(sharded, sha256=read.sha256.upper()).sha256 == read.sha256


def test_shards_that_are_not_what_the_index_says(sharded):
    content = json.loads(sharded.read_text())
    first, second = content["weight_map"].values()

    def refused(weight_map, message):
        sharded.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message) as info:
            read_weights(sharded)
        assert "\n" not in str(info.value)

    refused({"w0": first, "w1": second, "w2": second}, "lacks 'w2'")
    refused({"w0": first, "x": second}, "holds 'w1', .* and 1 more differ")
    refused({"w0": first, "w1": "missing.bin"}, r"are not beside it: missing\.bin")
    for name in ("../w.bin", "/etc/w.bin", "a/w.bin", "a\\w.bin", "passwd", 3, "w.bin\0"):
        refused({"w0": first, "w1": name}, "not the name of a weights file beside it")
    refused({}, "no weight_map")
    sharded.write_text("[" * 10_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_weights(sharded)


def test_a_given_hash_is_checked(tmp_path):
    path = write_zip(tmp_path / "w.pth", {"w": weight()})
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_weights(path, sha256=actual.upper()).sha256 == actual
    with pytest.raises(UserError, match=f"w.pth has the SHA-256 {actual}, not {'0' * 64};"):
        read_weights(path, sha256="0" * 64)
    with pytest.raises(UserError, match="is no SHA-256"):
        read_weights(path, sha256="983f1562")


def test_official_names_promise_a_hash(tmp_path):
    path = write_zip(tmp_path / "w.pth", {"w": weight()})
    actual = read_weights(path).sha256
    wrong = path.rename(tmp_path / "convnext_tiny-983f1562.pth")
    with pytest.raises(UserError, match=f"{actual}, not 983f1562"):
        read_weights(wrong)
    dated = wrong.rename(tmp_path / "convnext_tiny-20240131.pth")
    assert read_weights(dated).sha256 == actual
    # One byte of a number is varied until the hash begins with a letter, as a right name would.
    for epoch in range(100):
        write_zip(dated, {"w": weight(), "epoch": epoch})
        actual = read_weights(dated).sha256
        if any(digit in "abcdef" for digit in actual[:8]):
            break
    right = dated.rename(tmp_path / f"convnext_tiny-{actual[:8]}.pth")
    assert read_weights(right).sha256 == actual


def test_a_damaged_config_is_named(tmp_path):
    path = write_zip(tmp_path / "w.pth", {"w": weight()})
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_weights(path)


def _tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def _npz(path):
    with path.open("wb") as file:
        np.savez(file, w=np.zeros(3))


def _zip_of(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return write


def _image(kind):
    return lambda path: Image.new("RGB", (8, 8)).save(path, kind)


def _bytes(content):
    return lambda path: path.write_bytes(content)


NOT_WEIGHTS = {
    "is empty": _bytes(b""),
    "is a web page": _bytes(b"\r\n <!DOCTYPE html><html><title>404</title></html>"),
    "is a JPEG image": _image("JPEG"),
    "is a PNG image": _image("PNG"),
    "WebP": _image("WEBP"),
    "is a tar archive": _tar,
    "is a Git LFS pointer": _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
    "is compressed by gzip": _bytes(b"\x1f\x8b\x08" + b"x" * 99),
    "is a plain pickle": _bytes(b"\x80\x04\x95\x0a\0\0\0\0\0\0\0}."),
    "is JSON text": _bytes(b'{"a": 1}'),
    "is a NumPy .npz archive": _npz,
    "is a TorchScript archive": _zip_of("m/data.pkl", "m/constants.pkl", "m/code/m.py"),
    "without PyTorch's data.pkl": _zip_of("readme.txt"),
    "holds a weights file; unpack it": _zip_of("folder/convnext.pth"),
    "is an empty zip archive": _zip_of(),
    "zero bytes": _bytes(bytes(5000)),
    "begins with the bytes 00 01 02": _bytes(bytes(range(200))),
    "is an HDF5 file": _bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 99),
}


@pytest.mark.parametrize("expected", NOT_WEIGHTS)
def test_what_is_no_weights_file(expected, tmp_path):
    path = tmp_path / "convnext.pth"
    NOT_WEIGHTS[expected](path)
    with pytest.raises(UserError, match=expected) as info:
        read_weights(path)
    assert str(info.value).startswith(str(path))
    assert "\n" not in str(info.value)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .* a hub name is written hf://"):
        read_weights("timm/convnext_tiny.fb_in1k")
    with pytest.raises(UserError, match="there is no file"):
        read_weights(tmp_path / "none.pth")
