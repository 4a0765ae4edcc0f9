"""Data sets of the names and features that TFDS gives them, and the protocol of each."""

import io
import json
import shutil

import make_imagenet_relatives
import numpy as np
import pytest
from colours import painted

from convnext_jax.data.benchmarks import default_split, open_benchmark, open_imagenet_c
from convnext_jax.data.class_matching import match_classes
from convnext_jax.data.imagenet_classes import imagenet_classes, imagenet_wnids
from convnext_jax.data.loader import eval_loader
from convnext_jax.data.targets import add_targets
from convnext_jax.data.transforms import ResizeEvalTransform
from convnext_jax.errors import UserError

WNIDS = imagenet_wnids()
# Stingray is in both subsets, tench in neither.
STINGRAY, TENCH = 6, 0


def labelled(*labels, **options):
    return [
        {"image": io.BytesIO(painted(k, **options)), "label": WNIDS[k], "file_name": f"{i}.jpg"}
        for i, k in enumerate(labels)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    build = make_imagenet_relatives.build
    build("imagenet_a", "test", labelled(STINGRAY, 11), root)
    build("imagenet_r", "test", labelled(STINGRAY, TENCH), root)
    build("imagenet_sketch", "test", labelled(3), root)
    build("imagenet_v2", "test", labelled(5, 999), root, "matched-frequency")
    real = [[], [4], [7, 2]]
    build(
        "imagenet2012_real",
        "validation",
        [
            {
                "image": io.BytesIO(painted(i)),
                "original_label": WNIDS[i],
                "real_label": labels,
                "file_name": f"{i}.jpg",
            }
            for i, labels in enumerate(real)
        ],
        root,
    )
    for name in ("fog_1", "fog_2", "snow_1"):
        build("imagenet2012_corrupted", "validation", labelled(8, size=224), root, name)
    return root


@pytest.mark.parametrize(
    ("name", "split", "labels"),
    [
        ("imagenet_a", "test", {STINGRAY, 11}),
        ("imagenet_r", "test", {STINGRAY, TENCH}),
        ("imagenet_sketch", "test", {3}),
        ("imagenet_v2/matched-frequency", "test", {5, 999}),
        ("imagenet2012_real", "validation", {0, 1, 2}),
        ("imagenet2012_corrupted/fog_1", "validation", {8}),
    ],
)
def test_each_is_opened_by_its_name_alone(data_dir, name, split, labels):
    benchmark = open_benchmark(name, None, str(data_dir))
    source = benchmark.source
    assert source.class_names == WNIDS
    assert source.identity["split"] == split
    assert {source[i].label for i in range(len(source))} == labels
    assert benchmark.cropped == ("corrupted" in name)


def test_a_and_r_ask_for_one_of_200_classes(data_dir):
    for letter in "ar":
        among = open_benchmark(f"imagenet_{letter}", None, str(data_dir)).among
        assert among == {c.wnid for c in imagenet_classes() if letter in c.subsets}
        assert len(among) == 200
    assert open_benchmark("imagenet_sketch", None, str(data_dir)).among is None
    restricted = open_benchmark("imagenet_sketch", None, str(data_dir), restrict=True)
    assert restricted.among == set(WNIDS)


def targets(benchmark, num_classes=1000):
    match = match_classes(benchmark.source.class_names, None, num_classes, among=benchmark.among)
    loader = eval_loader(benchmark.source, ResizeEvalTransform(8), batch_size=4)
    (batch,) = list(add_targets(loader, benchmark, match))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["target"].shape == (4, num_classes)
    return batch


def test_real_labels_are_sets_and_images_without_any_do_not_count(data_dir):
    benchmark = open_benchmark("imagenet2012_real", None, str(data_dir))
    batch = targets(benchmark)
    found = {
        int(label): (float(mask), np.flatnonzero(target).tolist())
        for label, mask, target in zip(
            batch["label"][:3], batch["mask"], batch["target"], strict=False
        )
    }
    assert found == {0: (0.0, []), 1: (1.0, [4]), 2: (1.0, [2, 7])}
    assert batch["mask"][3] == 0, "padding"


def test_the_targets_of_an_imagenet_22k_model(data_dir):
    batch = targets(open_benchmark("imagenet_v2/matched-frequency", None, str(data_dir)), 21841)
    wanted = {5: imagenet_classes()[5].index_22k, 999: imagenet_classes()[999].index_22k}
    for label, target in zip(batch["label"][:2], batch["target"], strict=False):
        assert np.flatnonzero(target).tolist() == [wanted[int(label)]]


def test_a_class_outside_of_the_protocol_is_told(data_dir):
    benchmark = open_benchmark("imagenet_r", None, str(data_dir))
    with pytest.raises(UserError, match="shows class 'tench', which is none of the 200"):
        targets(benchmark)


def test_imagenet_c_in_tfds(data_dir):
    parts = open_imagenet_c(("fog",), (1, 2), None, str(data_dir))
    assert list(parts) == [("fog", 1), ("fog", 2)]
    assert all(part.cropped for part in parts.values())
    assert parts["fog", 2].source.identity["name"] == "imagenet2012_corrupted/fog_2"
    with pytest.raises(UserError) as caught:
        open_imagenet_c(("fog", "snow"), (1, 2), None, str(data_dir))
    assert "needs all 4 parts" in str(caught.value)
    assert "tfds build imagenet2012_corrupted/snow_2" in str(caught.value)


def test_imagenet_c_as_its_authors_give_it(tmp_path):
    for corruption in ("fog", "snow"):
        folder = tmp_path / corruption / "1" / WNIDS[8]
        folder.mkdir(parents=True)
        (folder / "ILSVRC2012_val_00000001.JPEG").write_bytes(painted(8))
    parts = open_imagenet_c(("fog", "snow"), (1,), None, str(tmp_path))
    assert [len(part.source) for part in parts.values()] == [1, 1]
    assert all(part.cropped for part in parts.values())
    with pytest.raises(UserError, match="no image folder"):
        open_imagenet_c(("fog", "frost"), (1,), None, str(tmp_path))


def test_all_images_of_a_folder(image_folder):
    everything = open_benchmark("folder", "all", str(image_folder)).source
    assert len(everything) == 21
    assert len(open_benchmark("folder", None, str(image_folder)).source) < 21


def test_the_default_split(data_dir, tmp_path):
    assert default_split("folder") == default_split("digits") == "validation"
    assert default_split("imagenet_a", str(data_dir)) == "test"
    assert default_split("imagenet_a", str(tmp_path)) == "validation"
    with pytest.raises(UserError, match="tfds build imagenet_a"):
        open_benchmark("imagenet_a", None, str(tmp_path))


def test_tfrecord_says_how_to_convert(data_dir, tmp_path):
    """And what that command leaves is read, the label sets too."""
    directory = tmp_path / "imagenet2012_real" / "1.0.0"
    shutil.copytree(data_dir / "imagenet2012_real" / "1.0.0", directory)
    info = directory / "dataset_info.json"
    content = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(content))
    with pytest.raises(UserError, match="convert_format --dataset_version_dir="):
        open_benchmark("imagenet2012_real", None, str(tmp_path))
    info.write_text(json.dumps(content | {"alternativeFileFormats": ["array_record"]}))
    converted = open_benchmark("imagenet2012_real", None, str(tmp_path))
    assert sorted(converted.label_sets[i].tolist() for i in range(3)) == [[], [4], [7, 2]]
