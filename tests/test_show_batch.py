import numpy as np
import pytest
from PIL import Image
from runs import CONFIG_FILE

from convnext_jax import cli, show_batch
from convnext_jax.contact_sheets import Tile, contact_sheet
from convnext_jax.data.augment import AugmentConfig, normalize

PLAIN = ["--config.augment.policy=", "--config.augment.erasing_prob=0"]


def run(*arguments: str) -> int:
    return cli.run(show_batch.main, ["--config", str(CONFIG_FILE), *arguments])


def test_writes_a_sheet_and_overwrites_nothing(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    data = [*PLAIN, f"--config.data.data_dir={tmp_path / 'data'}", "--images=16"]
    assert run(*data, "--out", str(out)) == 0
    assert "wrote" in capsys.readouterr().out
    # Two rows of eight digits, enlarged to 96 pixels, with two lines of text.
    with Image.open(out) as sheet:
        assert sheet.size == (4 + 8 * 100, 4 + 2 * (96 + 30 + 4))
    assert run(*data, "--out", str(out)) == 2
    assert "exists; give another --out, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--out=nowhere/sheet.png"], "there is no directory nowhere"),
        (["--operations", *PLAIN], "config.augment.policy is empty"),
        (["--operations", f"--out={__file__}"], "is a file; with --operations give a folder"),
        (["--images=0"], "--images must be 1 or more"),
        (["--step=-1"], "--step 0 or more"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, wanted, capsys):
    assert run(*arguments) == 2
    assert wanted in capsys.readouterr().err


def test_operations_make_one_sheet_each(tmp_path, capsys):
    data = [f"--config.data.data_dir={tmp_path / 'data'}", "--images=1"]
    jitter = [*PLAIN, "--config.augment.color_jitter=0.3", "--operations"]
    assert run(*data, *jitter, "--out", str(tmp_path / "sheets")) == 0
    sheets = sorted(path.stem for path in (tmp_path / "sheets").iterdir())
    assert sheets == ["Brightness", "Color", "Contrast"]


def test_captions_tell_lambda():
    targets = np.full((2, 4), 0.1 / 4)
    targets[0, 1] += 0.9
    targets[1, 3] += 0.9 * 0.7
    targets[1, 0] += 0.9 * 0.3
    assert show_batch.captions(targets, 0.1, ["a", "b", "c", "d"]) == [
        ("1.00 b", ""),
        ("0.70 d", "0.30 a"),
    ]


def test_normalisation_is_taken_back():
    levels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    shown = show_batch.to_levels(normalize(levels), AugmentConfig())
    np.testing.assert_array_equal(shown, levels)


@pytest.mark.parametrize("name", ["Invert", "Contrast"])
def test_an_operations_sheet_shows_both_results(name):
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    sheet = np.asarray(show_batch.operation_sheet(name, image, AugmentConfig()))
    assert sheet.shape[0] == 4 + 2 * (96 + 30 + 4)
    ours, theirs = sheet[4:100, 4:100], sheet[134:230, 4:100]
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != image).any()


def test_long_captions_are_cut_to_the_image():
    tile = Tile(np.zeros((96, 96, 3), np.uint8), ("a caption that is much too long for this",))
    sheet = np.asarray(contact_sheet([tile], 1))
    assert sheet.shape == (96 + 15 + 8, 104, 3)
    assert (sheet[100:, 100:] == 255).all()
