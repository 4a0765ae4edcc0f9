import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import make_imagenet_like
import numpy as np
import pytest
from conftest import encode
from PIL import Image

from convnext_jax.data.loader import eval_loader, train_loader
from convnext_jax.data.sources import open_source
from convnext_jax.data.transforms import EvalTransform, TrainTransform, decode
from convnext_jax.errors import UserError


def contents(source):
    return [source[i] for i in range(len(source))]


# Folders.


def split_layout(root: Path, validation_name: str) -> Path:
    for split, count in (("train", 3), (validation_name, 2)):
        for name in ("ant", "bee"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{split}{i}.JPG").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
    return root


@pytest.mark.parametrize("validation_name", ["val", "validation", "test"])
def test_folders_for_each_split(tmp_path, validation_name):
    root = str(split_layout(tmp_path, validation_name))
    train, validation = (
        open_source("folder", "train", root),
        open_source("folder", "validation", root),
    )
    assert (len(train), len(validation)) == (6, 4)
    assert train.class_names == validation.class_names == ("ant", "bee")
    assert train.num_classes == 2
    assert [train[i].label for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert train.describe(4) == str(tmp_path / "train" / "bee" / "train1.JPG")
    assert validation.describe(0) == str(
        tmp_path / validation_name / "ant" / f"{validation_name}0.JPG"
    )


def test_one_folder_is_split_by_class_and_seed(image_folder):
    def names(split, seed=0):
        source = open_source(
            "folder", split, str(image_folder), validation_fraction=0.25, split_seed=seed
        )
        return [source.describe(i) for i in range(len(source))]

    train, validation = names("train"), names("validation")
    everything = sorted(str(path) for path in image_folder.glob("*/*"))
    assert sorted(train + validation) == everything
    assert train == sorted(train)
    assert Counter(Path(name).parent.name for name in validation) == {"ant": 2, "bee": 2, "cat": 2}
    assert names("validation") == validation
    assert names("validation", seed=1) != validation


def test_a_train_folder_alone_is_split_too(image_folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    image_folder.rename(root / "train")
    sizes = [len(open_source("folder", split, str(root))) for split in ("train", "validation")]
    assert sizes == [18, 3]


def test_no_class_loses_all_its_images_to_a_split(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
    for fraction in (0.01, 0.99):
        for split in ("train", "validation"):
            source = open_source("folder", split, str(tmp_path), validation_fraction=fraction)
            assert [source[i].label for i in range(len(source))] == [0, 1]


def test_hidden_and_other_files_are_passed_over_and_subfolders_read(image_folder):
    (image_folder / "ant" / "._00.png").write_bytes(b"what macOS leaves on foreign disks")
    (image_folder / "ant" / "notes.txt").write_text("x")
    (image_folder / ".cache").mkdir()
    (image_folder / "ant" / "more").mkdir()
    (image_folder / "ant" / "more" / "größe.webp").write_bytes(b"x")
    source = open_source("folder", "train", str(image_folder), validation_fraction=0.0)
    assert len(source) == 22
    assert source.describe(8).endswith("ant/more/größe.webp")


def test_sources_are_picklable_and_know_who_they_are(image_folder):
    source = open_source("folder", "train", str(image_folder))
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == contents(source)
    assert copy.identity == source.identity == json.loads(json.dumps(source.identity))
    assert set(source.identity) == {"name", "version", "split", "num_examples", "fingerprint"}
    (image_folder / "ant" / "99.png").write_bytes(b"x")
    changed = open_source("folder", "train", str(image_folder))
    assert changed.identity["fingerprint"] != source.identity["fingerprint"]


def test_folder_mistakes_are_told(tmp_path, image_folder):
    def message(split="train", root=image_folder, **options):
        with pytest.raises(UserError) as caught:
            open_source("folder", split, root and str(root), **options)
        return str(caught.value)

    assert "needs data_dir" in message(root=None)
    assert "There is no image folder" in message(root=tmp_path / "nowhere")
    assert "no split 'dev'" in message("dev")
    assert "holds no test/ folder" in message("test")
    assert "validation_fraction above 0.0" in message("validation", validation_fraction=0.0)
    assert "must be in [0, 1)" in message(validation_fraction=1.0)
    (tmp_path / "empty").mkdir()
    assert "holds no class folders" in message(root=tmp_path / "empty")
    (image_folder / "dog").mkdir()
    assert "dog' holds no images" in message()
    layout = split_layout(tmp_path / "layout", "val")
    (layout / "val" / "bee").rename(layout / "val" / "bees")
    for split in ("train", "validation"):
        differing = message(split, root=layout)
        assert "train': bee;" in differing
        assert "val': bees)" in differing
    (tmp_path / "only" / "val" / "ant").mkdir(parents=True)
    assert "holds val/ but no train/" in message(root=tmp_path / "only")


# The embedded digits.


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """Where three processes have written the digits at once."""
    data_dir = tmp_path_factory.mktemp("digits")
    program = (
        "import sys; from convnext_jax.data.sources import open_source; "
        "print(len(open_source('digits', 'train', sys.argv[1]))); "
        "assert 'tensorflow' not in sys.modules"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, str(data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for writer in writers:
        assert writer.communicate(timeout=120) == ("1438\n", "")
        assert writer.returncode == 0
    return data_dir


def test_digits_are_those_of_scikit_learn(digits_dir):
    from sklearn.datasets import load_digits

    digits = load_digits()
    expected = Counter(
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    found = Counter()
    for split, size in (("train", 1438), ("validation", 359)):
        source = open_source("digits", split, str(digits_dir))
        assert len(source) == size
        assert source.class_names == tuple("0123456789")
        for record in contents(source):
            pixels = np.asarray(decode(record.image))[..., 0]
            assert not (pixels % 15).any()
            found[(pixels // 15).tobytes(), record.label] += 1
    assert found == expected


def test_digits_are_split_alike_in_each_class(digits_dir):
    counts = {
        split: Counter(r.label for r in contents(open_source("digits", split, str(digits_dir))))
        for split in ("train", "validation")
    }
    for label in range(10):
        held_out, kept = counts["validation"][label], counts["train"][label]
        assert held_out / (held_out + kept) == pytest.approx(0.2, abs=0.003)


def test_digits_are_a_tfds_data_set_written_once(digits_dir):
    import tensorflow_datasets as tfds

    directory = digits_dir / "digits" / "1.0.0"
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    open_source("digits", "validation", str(digits_dir))
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert [path.name for path in digits_dir.iterdir()] == ["digits"]
    builder = tfds.builder_from_directory(str(directory))
    example = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})[0]
    assert set(example) == {"image", "label"}


def test_digits_go_where_the_environment_says(tmp_path, monkeypatch, digits_dir):
    monkeypatch.setenv("CONVNEXT_JAX_DATA_DIR", str(tmp_path))
    source = open_source("digits", "train")
    assert (tmp_path / "digits" / "1.0.0").is_dir()
    assert source.identity == open_source("digits", "train", str(digits_dir)).identity


# TFDS.


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory):
    """A data set of imagenet2012's name and features: 15 images of five classes."""
    images = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, wnid in enumerate(("n01440764", "n01443537", "n02123045", "n04238763", "n15075141")):
        for j in range(3):
            pixels = rng.integers(0, 256, (40 + i, 50 + j, 3), dtype=np.uint8)
            (images / f"{wnid}_{j}.JPEG").write_bytes(encode(pixels, "JPEG"))
    data_dir = tmp_path_factory.mktemp("tfds")
    make_imagenet_like.build(images, data_dir)
    return images, data_dir


def test_tfds_data_sets_are_read_by_name(imagenet_like):
    images, data_dir = imagenet_like
    source = open_source("imagenet2012", "train", str(data_dir))
    assert (len(source), source.num_classes) == (12, 1000)
    assert source.class_names[0] == "n01440764"
    assert source.class_names[999] == "n15075141"
    for i, record in enumerate(contents(source)):
        assert source.describe(i).startswith(f"imagenet2012/5.1.0 train record {i} (")
        name = source.describe(i).split("(")[1].rstrip(")")
        assert record.image == (images / name).read_bytes()
        assert source.class_names[record.label] == name.split("_")[0]
    assert source.identity["name"] == "imagenet2012"
    assert source.identity["version"] == "5.1.0"
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == contents(source)


def test_tfds_split_expressions(imagenet_like):
    def size(split):
        return len(open_source("imagenet2012:5.*.*", split, str(imagenet_like[1])))

    assert size("validation") == 3
    assert size("train[:50%]") == 6
    assert size("train[9:]+validation") == 6
    everything = contents(open_source("imagenet2012", "train", str(imagenet_like[1])))
    assert (
        contents(open_source("imagenet2012", "train[9:]", str(imagenet_like[1]))) == everything[9:]
    )


def test_tfds_through_worker_processes(imagenet_like):
    source = open_source("imagenet2012", "train", str(imagenet_like[1]))

    def batches(num_workers):
        iterator = train_loader(
            source,
            TrainTransform(16),
            batch_size=4,
            seed=0,
            start_step=1,
            num_steps=5,
            num_workers=num_workers,
        )
        result = list(iterator)
        iterator.close()
        return result

    for a, b in zip(batches(0), batches(2), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def message_for(name, split, data_dir):
    with pytest.raises(UserError) as caught:
        open_source(name, split, str(data_dir))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_data_set_says_what_to_type(tmp_path):
    told = message_for("cifar10", "train", tmp_path)
    assert f"`tfds build cifar10 --data_dir={tmp_path} --file_format=array_record`" in told
    assert "pip install tensorflow" in told
    told = message_for("imagenet2012", "train", tmp_path)
    assert f"archives into {tmp_path}/downloads/manual" in told
    told = message_for("imagenet_v2/matched-frequency:3.0.0", "test", tmp_path)
    assert "tfds build imagenet_v2/matched-frequency:3.0.0" in told


def test_an_unknown_name_gets_the_nearest(tmp_path):
    assert "did you mean 'digits'" in message_for("digit", "train", tmp_path)
    assert "'cifar10'" in message_for("cifar11", "train", tmp_path)
    assert "cannot be opened" in message_for("not a name", "train", tmp_path)


def test_an_absent_split_names_those_there_are(imagenet_like):
    told = message_for("imagenet2012", "test", imagenet_like[1])
    assert "no split 'test': it has 'train', 'validation'." in told
    assert "Slices read" in message_for("imagenet2012", "train[a]", imagenet_like[1])


def edited_copy(imagenet_like, tmp_path, file_name, edit):
    import shutil

    target = tmp_path / "imagenet2012" / "5.1.0"
    shutil.copytree(imagenet_like[1] / "imagenet2012" / "5.1.0", target)
    content = json.loads((target / file_name).read_text())
    edit(content)
    (target / file_name).write_text(json.dumps(content))
    return target


def test_tfrecord_says_how_to_convert(imagenet_like, tmp_path):
    directory = edited_copy(
        imagenet_like, tmp_path, "dataset_info.json", lambda c: c.update(fileFormat="tfrecord")
    )
    told = message_for("imagenet2012", "train", tmp_path)
    assert "stored as tfrecord" in told
    assert (
        "`python -m tensorflow_datasets.scripts.convert_format "
        f"--dataset_version_dir={directory} --out_file_format=array_record`"
    ) in told
    # What that command leaves: both formats side by side.
    info = directory / "dataset_info.json"
    info.write_text(
        json.dumps(json.loads(info.read_text()) | {"alternativeFileFormats": ["array_record"]})
    )
    converted = open_source("imagenet2012", "train", str(tmp_path))
    assert contents(converted) == contents(
        open_source("imagenet2012", "train", str(imagenet_like[1]))
    )


def test_a_missing_shard_is_told_before_training(imagenet_like, tmp_path):
    directory = edited_copy(imagenet_like, tmp_path, "dataset_info.json", lambda c: None)
    next(directory.glob("*validation*")).unlink()
    assert "is incomplete" in message_for("imagenet2012", "validation", tmp_path)
    assert len(open_source("imagenet2012", "train", str(tmp_path))) == 12


def test_no_classification_data_set(imagenet_like, tmp_path):
    edited_copy(
        imagenet_like,
        tmp_path,
        "features.json",
        lambda c: c["featuresDict"]["features"].pop("label"),
    )
    assert "not one of image classification" in message_for("imagenet2012", "train", tmp_path)


def test_the_imagenet_sample_goes_the_whole_way(imagenet_sample, tmp_path):
    make_imagenet_like.build(imagenet_sample[0].parent, tmp_path)
    source = open_source("imagenet2012", "validation", str(tmp_path))
    assert len(source) == 100
    batches = list(eval_loader(source, EvalTransform(32), batch_size=32))
    assert sum(batch["mask"].sum() for batch in batches) == 100
    name = source.describe(0).split("(")[1].rstrip(")")
    with Image.open(imagenet_sample[0].parent / name) as image:
        w, h = image.size
        assert decode(source[0].image).size == (w, h)
    assert source.class_names[batches[0]["label"][0]] == name.split("_")[0]
