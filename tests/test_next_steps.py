"""What a run says at its end can be typed as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_config
from PIL import Image

from convnext_jax import config_files
from convnext_jax.models import ConvNeXt, create_model
from convnext_jax.next_steps import next_steps

pytest_plugins = ["run_fixtures"]

ROOT = Path(__file__).parents[1]


def steps_of(printed):
    section = printed.partition("\nnext\n")[2]
    found = dict(re.findall(r"^  ([\w -]+?) {2,}(\S.*)$", section, re.MULTILINE))
    return {label: shlex.split(command.rpartition("&& ")[2]) for label, command in found.items()}


def photographs(directory):
    rng = np.random.default_rng(0)
    for index in range(140):
        path = directory / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)


def test_a_run_ends_with_them(finished):
    steps = steps_of(finished.out)
    assert list(steps) == ["predict", "look at curves", "fine-tune"]
    workdir = str(finished.workdir)
    assert steps["predict"][1:] == ["-m", "convnext_jax.predict", "--weights", workdir, "IMAGE"]
    assert steps["look at curves"] == ["tensorboard", "--logdir", f"{workdir}/tensorboard"]
    assert Path(steps["look at curves"][2]).is_dir()


def test_fine_tuning_takes_the_very_network(finished):
    _, _, _, option, path, _, _, *overrides = steps_of(finished.out)["fine-tune"]
    assert option == "--config"
    own, tuned = tiny_config.get_config(), config_files.load_config(path, overrides)
    assert tuned.init_from == str(finished.workdir)
    assert tuned.data.name == "folder"
    for config in (own, tuned):
        config.model.drop_path_rate = 0.0
    models = [
        create_model(c.model.name, num_classes=2, **c.model.overrides.to_dict())
        for c in (own, tuned)
    ]
    assert models[0] == models[1]
    assert isinstance(models[0], ConvNeXt)
    assert tuned.data.image_size == own.data.image_size
    assert tuple(tuned.augment.mean) == tuple(own.augment.mean)


def test_a_place_with_a_space_is_quoted():
    config = tiny_config.get_config()
    model = create_model(config.model.name, **config.model.overrides.to_dict())
    steps = next_steps(config, model, Path("my runs/first"))
    assert shlex.split(steps["predict"])[4] == "my runs/first"
    assert "my runs/first_photos" in shlex.split(steps["fine-tune"])


def test_other_networks_are_not_offered_what_they_cannot():
    config = tiny_config.get_config()
    model = create_model("resnet50")
    assert "fine-tune" not in next_steps(config, model, Path("runs/resnet"))


@pytest.mark.slow
def test_they_run(finished, tmp_path):
    photographs(tmp_path / "photos")
    steps = steps_of(finished.out)
    image = str(tmp_path / "photos" / "cat" / "0.png")
    predict = [image if word == "IMAGE" else word for word in steps["predict"]]
    tune = [word.replace("PHOTOS", str(tmp_path / "photos")) for word in steps["fine-tune"]]
    tune[tune.index("--workdir") + 1] = str(tmp_path / "tuned")
    for command in (predict, [*tune, "--config.total=2 steps"]):
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout
