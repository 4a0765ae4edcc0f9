"""The program `python -m convnext_jax.convert`: what it writes, and what it refuses."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convnext_jax import cli
from convnext_jax.convert.__main__ import main
from convnext_jax.convert.pretrained import open_pretrained
from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.training import weight_checkpoints

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "models.npz"


def golden_weights(label):
    prefix = f"{label}/weights/"
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "v1.safetensors"
    save_file(golden_weights("v1"), path)
    return path


def run(*arguments):
    return cli.run(main, [str(a) for a in arguments])


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("label", "dtype"),
    [
        ("v1", np.float32),
        ("v1", np.float16),
        ("v1", ml_dtypes.bfloat16),
        ("v2", np.float32),
        ("iso", np.float32),
    ],
)
def test_there_and_back_is_the_identity(label, dtype, tmp_path):
    weights = {k: v.astype(dtype) for k, v in golden_weights(label).items()}
    save_file(weights, tmp_path / "there.safetensors")
    assert run(tmp_path / "there.safetensors", tmp_path / "here") == 0
    back = tmp_path / "back.safetensors"
    assert run(tmp_path / "here", back, "--to", "safetensors", "--layout", "official") == 0
    assert_same_tensors(load_file(back), weights)
    # What is loaded is float32 all the same.
    leaves = jax.tree.leaves(open_pretrained(tmp_path / "here").variables)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


def test_what_it_prints_and_stores(official, tmp_path, capsys):
    assert run(official, tmp_path / "here") == 0
    printed = capsys.readouterr().out
    found = open_pretrained(official)
    for part in (
        str(official),
        found.sha256,
        "official",
        "depths (1, 1, 2, 1), dims (6, 8, 10, 12)",
        "5 classes",
        "short side to 256, centre crop of 224, bicubic",
        f"python -m convnext_jax.predict --weights {tmp_path / 'here'} IMAGE",
    ):
        assert part in printed
    stored = find_weights(tmp_path / "here").provenance
    assert stored == find_weights(official).provenance
    assert open_pretrained(tmp_path / "here").preprocessing == found.preprocessing


def test_a_file_for_others_says_what_it_is(official, tmp_path):
    back = tmp_path / "back.safetensors"
    assert run(official, back, "--to", "safetensors", "--layout", "timm") == 0
    with safe_open(back, "np") as file:
        assert "stages.2.blocks.1.mlp.fc1.weight" in file.keys()  # noqa: SIM118, no mapping
        about = file.metadata()
    assert about["format"] == "pt"
    beside = tmp_path / "beside"
    beside.touch()
    assert back.stat().st_mode == beside.stat().st_mode
    assert json.loads(about["convnext_jax"])["source"] == str(official)


def test_dry_run_prints_every_tensor_and_writes_nothing(official, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run(official, "--dry-run") == 0
    printed = capsys.readouterr().out
    for name in golden_weights("v1"):
        assert name in printed
    assert "stages_2/blocks_1/pwconv1/kernel" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, capsys):
    weights = golden_weights("v1")
    del weights["stages.1.0.norm.bias"]
    weights["stages.2.1.pwconv1.weight"] = np.zeros((40, 11), np.float32)
    weights["stages.0.0.attention.weight"] = np.zeros(3, np.float32)
    save_file(weights, tmp_path / "broken.safetensors")
    assert run(tmp_path / "broken.safetensors", tmp_path / "here") == 2
    message = capsys.readouterr().err
    for part in (
        "stages.1.0.norm.bias",
        "stages_1/blocks_0/norm/bias",
        "stages.2.1.pwconv1.weight",
        "40, 11",
        "10, 40",
        "stages.0.0.attention.weight",
    ):
        assert part in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.safetensors"]


def test_nothing_is_overwritten_unasked(official, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for options in ((), ("--to", "safetensors")):
        assert run(official, taken, *options) == 2
        assert f"{taken} exists already" in capsys.readouterr().err
    assert (taken / "thesis.txt").read_text() == "years of work"

    assert run(official, tmp_path / "here") == 0
    assert run(official, tmp_path / "here") == 2
    assert run(official, tmp_path / "here", "--overwrite") == 0


@pytest.mark.parametrize("options", [(), ("--to", "safetensors")])
def test_a_place_that_cannot_be_written_is_named(official, tmp_path, capsys, options):
    (tmp_path / "file").write_text("no directory")
    assert run(official, tmp_path / "file" / "here", *options) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'here'} can't be written" in error
    assert error.count("\n") == 1


def test_a_failure_leaves_what_was_there(official, tmp_path):
    assert run(official, tmp_path / "here") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    parts = iter(range(5))

    def full():
        if next(parts) == 4:
            raise OSError(28, "No space left on device")

    weights = find_weights(official)
    with pytest.raises(UserError, match="can't be written: No space left on device"):
        weight_checkpoints.save_weights(
            tmp_path / "here", weights.arrays(), {}, overwrite=True, written=full
        )
    assert {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "v1.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "DEST is missing"),
        (("here", "--layout", "timm"), "add --to safetensors"),
        (("here", "--sha256", "0" * 64), "SHA-256"),
    ],
)
def test_mistakes(official, tmp_path, capsys, arguments, message):
    assert run(official, *(tmp_path / a if a == "here" else a for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "here").exists()
