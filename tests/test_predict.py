"""The program that names what is on images: what it prints, writes, reports and refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_pretrained import tiny_pretrained

from convnext_jax import cli, inference, predict
from convnext_jax.convert.pretrained import open_pretrained
from convnext_jax.data.imagenet_classes import imagenet_class_names
from convnext_jax.errors import UserError

pytest_plugins = ["run_fixtures"]

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
ANY = ["--weights", "any"]


@pytest.fixture(scope="module")
def network():
    return tiny_pretrained(class_names=NAMES)


@pytest.fixture
def use(monkeypatch):
    """Lets the program open this network, whatever --weights says."""

    def put(pretrained):
        monkeypatch.setattr(predict, "open_pretrained", lambda source, sha256: pretrained)

    return put


@pytest.fixture
def images(tmp_path):
    """Five photographs' worth of noise in a folder, one of them in a subfolder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name, shape in (
        *(("a.png", (50, 60, 3)), ("b.png", (33, 90, 3)), ("c.png", (40, 40, 3))),
        *(("d.png", (8, 5, 3)), ("sub/e.png", (70, 41, 3))),
    ):
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        noise.resize(shape[1::-1], Image.Resampling.BICUBIC).save(folder / name)
    return folder


ORDER = ["a.png", "b.png", "c.png", "d.png", "sub/e.png"]


def by_hand(network, path, method="__call__"):
    """What the network says of a PNG file, written out step by step."""
    preprocessing = network.preprocessing
    pixels = preprocessing.transform()(path.read_bytes()) / 255
    x = (pixels - preprocessing.mean) / preprocessing.std
    return np.asarray(
        network.model.apply(network.variables, jnp.asarray(x[None], jnp.float32), method=method)[0]
    )


def run(capsys, *argv):
    """Exit status, standard output, standard error."""
    try:
        status = cli.run(predict.main, argv)
    except SystemExit as exits:
        status = exits.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_json(use, network, images, capsys):
    use(network)
    status, out, err = run(capsys, *ANY, "--json", str(images), "--top", "3")
    document = json.loads(out)
    assert status == 0
    assert {k: v for k, v in document.items() if k != "images"} == {
        "model": "convnext_test",
        "weights": "weights.pth",
        "sha256": "0" * 64,
        "errors": [],
    }
    assert [image["path"] for image in document["images"]] == [str(images / p) for p in ORDER]
    for image in document["images"]:
        logits = by_hand(network, images / image["path"])
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-probabilities)[:3]
        assert [p["class"] for p in image["predictions"]] == best.tolist()
        assert [p["name"] for p in image["predictions"]] == [NAMES[i] for i in best]
        np.testing.assert_allclose(
            [p["probability"] for p in image["predictions"]], probabilities[best], rtol=1e-4
        )
    # The clock speaks on the other channel.
    assert "5 images in" in err


def test_table(use, network, images, capsys):
    use(network)
    _, out, _ = run(capsys, *ANY, "--json", str(images))
    expected = []
    for image in json.loads(out)["images"]:
        expected.append(image["path"])
        expected += [
            f"  {p['probability']:7.2%}  {p['class']}  {p['name']}" for p in image["predictions"]
        ]
    status, out, _ = run(capsys, *ANY, str(images))
    assert status == 0
    assert out.splitlines() == expected
    assert len(expected) == 5 * 6


def test_columns_are_aligned(tmp_path):
    predictions = [
        {"class": 7, "name": "seven", "probability": 1.0},
        {"class": 812, "name": "eight hundred", "probability": 0.00004},
    ]
    assert predict.format_table(tmp_path / "x.jpg", predictions) == (
        f"{tmp_path}/x.jpg\n  100.00%    7  seven\n    0.00%  812  eight hundred"
    )


def test_the_batch_size_changes_nothing(use, network, images, capsys):
    use(network)
    documents = [
        json.loads(run(capsys, *ANY, "--json", str(images), "--batch_size", size)[1])
        for size in ("2", "100")
    ]
    for small, large in zip(*(d["images"] for d in documents), strict=True):
        assert small["path"] == large["path"]
        for a, b in zip(small["predictions"], large["predictions"], strict=True):
            assert (a["class"], a["name"]) == (b["class"], b["name"])
            assert a["probability"] == pytest.approx(b["probability"], rel=1e-5)


def test_batches_have_one_shape_and_keep_the_order(tmp_path):
    paths = [tmp_path / str(i) for i in range(11)]
    bad = []

    def load(path):
        i = int(path.name)
        if i in (0, 4, 10):
            raise inference.UndecodableImageError(f"number {i}")
        return np.full((2, 2, 3), i, np.uint8)

    found = list(inference.batches(paths, load, 3, lambda path, error: bad.append(error)))
    assert {batch.images.shape for batch in found} == {(3, 2, 2, 3)}
    assert [[int(p.name) for p in batch.paths] for batch in found] == [[1, 2, 3], [5, 6, 7], [8, 9]]
    for batch in found:
        rows = batch.images[:, 0, 0, 0].tolist()
        assert rows == [int(p.name) for p in batch.paths] + [0] * (3 - len(batch.paths))
    assert bad == ["number 0", "number 4", "number 10"]


def test_another_error_is_not_swallowed(tmp_path):
    def load(path):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(inference.batches([tmp_path], load, 1, lambda path, error: None))


def test_images_that_cannot_be_read_are_reported_and_the_rest_go_on(use, network, images, capsys):
    use(network)
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:60])
    (images / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    arguments = [*ANY, str(images), str(images / "missing.jpg")]
    status, out, err = run(capsys, *arguments)
    assert status == 1
    named = [line for line in out.splitlines() if not line.startswith("  ")]
    assert named == [str(images / p) for p in ORDER if p != "b.png"]
    lines = err.splitlines()
    assert lines[0].startswith(f"{images / 'b.png'}: ")
    assert lines[1].startswith(f"{images / 'phone.heic'}: is a HEIC photograph")
    assert lines[2] == f"{images / 'missing.jpg'}: can't be read: No such file or directory"
    assert lines[-1] == "left out 3 of 7 images, see above"
    assert len(lines) == 5

    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 1
    document = json.loads(out)
    assert len(document["images"]) == 4
    assert [error["path"] for error in document["errors"]] == [
        str(images / name) for name in ("b.png", "phone.heic", "missing.jpg")
    ]


def test_nothing_readable(use, network, tmp_path, capsys):
    use(network)
    status, out, err = run(capsys, *ANY, "--json", str(tmp_path / "missing.jpg"))
    assert status == 1
    assert json.loads(out)["images"] == []
    assert "left out 1 of 1 images" in err
    file = tmp_path / "features.npz"
    assert run(capsys, *ANY, "--features", str(file), str(tmp_path / "missing.jpg"))[0] == 1
    assert not file.exists()


def test_one_sees_what_a_person_sees(use, network, images, tmp_path, capsys):
    """Stored on its side, as CMYK, with 16 bits or with a transparent border: the same image."""
    use(network)
    upright = Image.open(images / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "1_turned.png", exif=exif)
    upright.convert("CMYK").save(tmp_path / "2_cmyk.jpg", quality=100, subsampling=0)
    upright.convert("RGBA").save(tmp_path / "3_alpha.png")
    upright.save(tmp_path / "0_plain.png")
    # With stored pixels and no regard to all this, the answer would be another.
    exif_ignored = network.preprocessing.transform()((tmp_path / "1_turned.png").read_bytes())
    assert np.abs(exif_ignored - network.preprocessing.transform().apply(upright)).max() > 50

    _, out, _ = run(capsys, *ANY, "--json", f"{tmp_path}/[0-9]_*")
    predictions = [
        {p["class"]: p["probability"] for p in image["predictions"]}
        for image in json.loads(out)["images"]
    ]
    assert len(predictions) == 4
    assert predictions[1] == predictions[3] == predictions[0]
    for i, probability in predictions[0].items():
        assert predictions[2].get(i, 0) == pytest.approx(probability, abs=0.02)


def test_features(use, network, images, tmp_path, capsys):
    use(network)
    file = tmp_path / "out" / "features.npz"
    arguments = [*ANY, str(images), "--batch_size", "2", "--features", str(file)]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert out == f"wrote {file}: features (5, 12), float32\n"
    with np.load(file, allow_pickle=False) as arrays:
        assert set(arrays) == {"features", "paths", "model", "source", "sha256"}
        assert arrays["features"].dtype == np.float32
        assert arrays["paths"].tolist() == [str(images / p) for p in ORDER]
        assert str(arrays["model"]) == "convnext_test"
        assert str(arrays["source"]) == "weights.pth"
        for path, features in zip(ORDER, arrays["features"], strict=True):
            expected = by_hand(network, images / path, "pooled_features")
            np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
    assert [p.name for p in file.parent.iterdir()] == ["features.npz"]

    before = file.read_bytes()
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err == f"error: {file} exists; give --overwrite to replace it, or another name\n"
    assert file.read_bytes() == before
    assert (
        run(capsys, *arguments[:-4], str(images / "a.png"), *arguments[-2:], "--overwrite")[0] == 0
    )
    with np.load(file) as arrays:
        assert len(arrays["features"]) >= 1


def test_without_a_head(use, images, tmp_path, capsys):
    use(tiny_pretrained(num_classes=0))
    status, out, err = run(capsys, *ANY, str(images))
    assert (status, out) == (2, "")
    assert "have no head" in err
    assert "--features FILE.npz" in err
    assert run(capsys, *ANY, str(images), "--features", str(tmp_path / "f.npz"))[0] == 0


def test_class_names():
    assert inference.class_names(tiny_pretrained(class_names=NAMES)) == NAMES
    assert inference.class_names(tiny_pretrained()) is None
    thousand = tiny_pretrained(num_classes=1000)
    assert inference.class_names(thousand) == imagenet_class_names()
    own = tuple(f"own {i}" for i in range(1000))
    assert inference.class_names(dataclasses.replace(thousand, class_names=own)) == own


def test_classes_without_names_have_numbers(use, images, capsys):
    use(tiny_pretrained())
    _, out, _ = run(capsys, *ANY, "--top", "100", str(images / "a.png"))
    lines = out.splitlines()[1:]
    assert len(lines) == 7
    assert all(line.split()[1:] == [line.split()[1], "class", line.split()[1]] for line in lines)


def test_another_size(use, network, images, capsys):
    use(network)
    small, large = (
        run(capsys, *ANY, "--json", str(images / "a.png"), "--size", size)[1]
        for size in ("32", "64")
    )
    assert small != large
    status, _, err = run(capsys, *ANY, str(images), "--size", "7")
    assert status == 2
    assert "give --size 8 or more" in err


def test_a_strip_is_cut_only_where_the_centre_is_cropped(tmp_path, network):
    Image.new("RGB", (30_000, 1), (9, 99, 199)).save(tmp_path / "a.png")
    image = inference.load_image(tmp_path / "a.png", network)
    assert image.shape == (32, 32, 3)
    # Half red, half blue: the whole is to be seen where nothing is cropped.
    strip = np.zeros((2, 400, 3), np.uint8)
    strip[:, :200, 0] = strip[:, 200:, 2] = 255
    strip[:, 100:300] = 77
    Image.fromarray(strip).save(tmp_path / "b.png")
    whole = dataclasses.replace(
        network, preprocessing=dataclasses.replace(network.preprocessing, resize_size=None)
    )
    assert inference.load_image(tmp_path / "b.png", whole)[16, 0].tolist() == [255, 0, 0]
    assert inference.load_image(tmp_path / "b.png", network)[16, 0].tolist() == [77, 77, 77]


def test_weights_that_diverged(use, network, images, capsys):
    broken = jax.tree.map(lambda x: x * jnp.nan, network.variables)
    use(dataclasses.replace(network, variables=broken))
    status, out, err = run(capsys, *ANY, str(images))
    assert (status, out) == (2, "")
    assert "not finite" in err
    assert "weights.pth" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--top", "0"], "--top is 0; it must be 1 or more"),
        (["--batch_size", "-1"], "--batch_size is -1; it must be 1 or more"),
        (["--features", "file.txt"], "--features file.txt: the file is an .npz"),
    ],
)
def test_mistakes(use, network, images, capsys, arguments, sentence):
    use(network)
    status, out, err = run(capsys, *ANY, str(images), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        predict.main([*ANY, str(tmp_path)])


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "examples:" in out
    assert "--features FILE" in out


def test_a_name_that_is_no_text(use, network, images, capsys):
    use(network)
    odd = str(images / "a.png").encode().replace(b"a.png", b"\xff.png")
    with open(odd, "wb") as file:
        file.write((images / "a.png").read_bytes())
    status, out, _ = run(capsys, *ANY, "--json", str(images / "*.png"))
    assert status == 0
    assert json.loads(out)["images"][-1]["path"] == f"{images}/\\udcff.png"


def test_a_run_of_the_training_program(finished, tmp_path, capsys):
    from sklearn.datasets import load_digits

    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, load_digits().images, strict=False):
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(file)
    status, out, _ = run(
        capsys, "--weights", str(finished.workdir), "--json", "--top", "10", *map(str, files)
    )
    assert status == 0
    network = open_pretrained(finished.workdir)
    for file, image in zip(files, json.loads(out)["images"], strict=True):
        best = np.argsort(-by_hand(network, file))
        assert [p["name"] for p in image["predictions"]] == [str(i) for i in best]
