"""The commands that the error messages and docs/imagenet.md give, run as they are told.

They need TensorFlow, which is installed into an environment of its own, some 2 GB and minutes; an
environment that exists is used where CONVNEXT_JAX_PREPARATION names its directory.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import numpy as np
import pytest
from conftest import encode

from convnext_jax.data.sources import open_source
from convnext_jax.errors import UserError

pytestmark = pytest.mark.nightly

# As docs/imagenet.md has it.
PACKAGES = (
    "tensorflow",
    "tensorflow-datasets",
    "apache-beam",
    "mlcroissant",
    "importlib_resources",
)
WNIDS = ("n01440764", "n01443537", "n02123045")

WRITE_TFRECORD = """
import sys
from pathlib import Path
import make_imagenet_like
builder = make_imagenet_like.ImagenetLike(data_dir=sys.argv[2], file_format="tfrecord")
builder.images = tuple(sorted(Path(sys.argv[1]).glob("*.JPEG")))
builder.download_and_prepare()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """The directory of an environment's programs."""
    if given := os.environ.get("CONVNEXT_JAX_PREPARATION"):
        return Path(given) / "bin"
    home = tmp_path_factory.mktemp("preparation")
    venv.create(home, with_pip=True)
    subprocess.run([home / "bin" / "pip", "install", "-q", *PACKAGES], check=True)
    return home / "bin"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(15):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        (folder / f"{WNIDS[i % 3]}_{i}.JPEG").write_bytes(encode(pixels, "JPEG"))
    return folder


def told(data_dir: Path, beginning: str) -> list[str]:
    """The command of an error message, in words."""
    with pytest.raises(UserError) as caught:
        open_source("imagenet2012", "train", str(data_dir))
    assert f"`pip install {' '.join(PACKAGES)}`" in str(caught.value)
    command = re.search(f"`({beginning}[^`]*)`", str(caught.value))
    assert command
    return shlex.split(command[1])


def run(environment: Path, command: list[str], **options) -> None:
    done = subprocess.run(
        [environment / command[0], *command[1:]], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr


def contents(data_dir: Path, split: str) -> dict[str, tuple[bytes, str]]:
    """File name -> encoded image and class name."""
    source = open_source("imagenet2012", split, str(data_dir))
    found = {}
    for i in range(len(source)):
        name = source.describe(i).split("(")[1].rstrip(")")
        found[name] = source[i].image, source.class_names[source[i].label]
    return found


def test_a_tfrecord_data_set_is_converted(environment, images, tmp_path):
    command = ["python", "-c", WRITE_TFRECORD, str(images), str(tmp_path)]
    run(environment, command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    run(environment, told(tmp_path, "python -m tensorflow_datasets"))
    files = sorted(images.iterdir())
    for split, expected in (("validation", files[::5]), ("train", set(files) - set(files[::5]))):
        assert contents(tmp_path, split) == {
            file.name: (file.read_bytes(), file.name.split("_")[0]) for file in expected
        }
    assert "tensorflow" not in sys.modules


def test_the_challenges_archives_are_prepared(environment, images, tmp_path):
    command = told(tmp_path, "tfds build")
    archives = tmp_path / "downloads" / "manual"
    archives.mkdir(parents=True)
    files = sorted(images.iterdir())
    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as train:
        for wnid in WNIDS:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for file in files:
                    if file.name.startswith(wnid):
                        of_class.add(file, file.name)
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = inner.tell()
            inner.seek(0)
            train.addfile(member, inner)
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as validation:
        for i, file in enumerate(files[:4]):
            validation.add(file, f"ILSVRC2012_val_{i + 1:08}.JPEG")
    run(environment, command)
    assert contents(tmp_path, "train") == {
        file.name: (file.read_bytes(), file.name.split("_")[0]) for file in files
    }
    found = contents(tmp_path, "validation")
    assert {name: image for name, (image, _) in found.items()} == {
        f"ILSVRC2012_val_{i + 1:08}.JPEG": file.read_bytes() for i, file in enumerate(files[:4])
    }
