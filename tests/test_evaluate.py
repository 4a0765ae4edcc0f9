"""The evaluation program: on a run of this library, and on data of which the answer is known."""

import csv
import io
import json
import socket
import subprocess
import sys

import jax
import make_imagenet_relatives
import numpy as np
import pytest
from colours import MEAN, STD, ColourModel, painted, squared_distances
from runs import column

from convnext_jax import evaluate
from convnext_jax.analysis.confidence import wilson_interval
from convnext_jax.analysis.corruption_error import ALEXNET_ERRORS
from convnext_jax.convert.preprocessing import Preprocessing
from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.data.imagenet_classes import (
    imagenet_class_names,
    imagenet_classes,
    imagenet_wnids,
)
from convnext_jax.errors import UserError
from convnext_jax.training.checkpoints import Checkpointer

pytest_plugins = ["run_fixtures"]
WNIDS, NAMES = imagenet_wnids(), imagenet_class_names()


# A run of this library.


def test_a_run_is_measured_as_it_was_in_training(finished, capsys):
    with Checkpointer(
        finished.workdir / "checkpoints", read_only=True, best_metric="score"
    ) as reader:
        best = reader.best_step()
    at = column(finished.workdir, "step", "eval").index(best)

    def recorded(name):
        return column(finished.workdir, name, "eval")[at]

    arguments = ["--weights", str(finished.workdir), "--dataset", "digits", "--batch_size"]
    averaged = evaluate.main([*arguments, "104", "--ema"])
    out, err = capsys.readouterr()
    for found, prefix in ((averaged, "ema_"), (evaluate.main([*arguments, "200", "--raw"]), "")):
        assert found["examples"] == 359
        assert found["accuracy"] == pytest.approx(recorded(prefix + "accuracy"), abs=1e-12)
        assert found["top5"] == pytest.approx(recorded(prefix + "top5"), abs=1e-12)
        assert found["loss"] == pytest.approx(recorded(prefix + "loss"), rel=1e-5)
    low, high = wilson_interval(round(359 * averaged["accuracy"]), 359)
    assert f"{averaged['accuracy']:.2%}   (95 % interval {low:.2%} to {high:.2%})" in out
    assert "digits 1.0.0 'validation', 359 images" in out
    assert "8 × cpu, 104 images a batch, 13 a device" in out
    assert "359/359" in err


def test_as_a_person_types_it(finished, tmp_path):
    command = [
        *(sys.executable, "-m", "convnext_jax.evaluate", "--weights", str(finished.workdir)),
        *("--dataset", "digits", "--json", str(tmp_path / "result.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"top-1   {result['accuracy']:7.2%}" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr.endswith("result.json exists already; give another name, or --overwrite\n")
    assert again.stderr.count("\n") == 1


PROCESS = """
import sys
import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from convnext_jax import cli, evaluate

sys.exit(cli.run(evaluate.main, sys.argv[3:]))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(finished, tmp_path, monkeypatch):
    """On other batches, of which each process holds half, and with one of them writing."""

    def arguments(name, batch_size):
        outputs = ("--json", tmp_path / f"{name}.json", "--csv", tmp_path / f"{name}.csv")
        weights = ("--weights", finished.workdir, "--dataset", "digits")
        return [*map(str, (*weights, *outputs, "--batch_size", batch_size))]

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), port, *arguments("two", 52)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert ["top-1" in out for out, _ in printed] == [True, False]
    one, two = (
        evaluate.main(arguments("one", 104)),
        json.loads((tmp_path / "two.json").read_text()),
    )
    assert two["examples"] == one["examples"] == 359
    assert (two["accuracy"], two["top5"]) == (one["accuracy"], one["top5"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


# A model of which one knows what it will say.


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """Runs the program with the colour model as weights, and returns its JSON."""

    def run(*arguments, num_classes=1000, **known):
        model = ColourModel(num_classes)
        pretrained = Pretrained(
            **{
                "model": model,
                "variables": {"params": {"scale": jax.numpy.full((1,), 10.0)}},
                "preprocessing": Preprocessing(16, 20, mean=MEAN, std=STD),
                "model_name": None,
                "class_names": None,
                "source": "colours",
                "sha256": None,
                "notes": (),
            }
            | known
        )
        monkeypatch.setattr(evaluate, "open_pretrained", lambda *_, **__: pretrained)
        target = tmp_path / "result.json"
        report = evaluate.main(
            ["--weights", "colours", "--json", str(target), "--overwrite", *map(str, arguments)]
        )
        assert json.loads(target.read_text()) == json.loads(json.dumps(report))
        return report

    return run


def folder(root, painted_as):
    """root/wnid/*.jpg; `painted_as` gives for each class the classes its images look like."""
    for label, looks in painted_as.items():
        (root / WNIDS[label]).mkdir(parents=True)
        for i, look in enumerate(looks):
            (root / WNIDS[label] / f"{i}.jpg").write_bytes(painted(look))
    return root


def table(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def losses(labels, looks, among=slice(None)):
    """Minus log of the probability of `labels`, which may be sets, for images of `looks`."""
    logits = -10 * squared_distances()[looks]
    chances = np.exp(logits)
    rights = [chances[i, np.atleast_1d(k)].sum() for i, k in enumerate(labels)]
    return -np.log(np.array(rights) / chances[:, among].sum(axis=1))


def test_accuracy_and_the_table_of_classes(evaluated, tmp_path, capsys):
    data = folder(tmp_path / "data", {0: [0, 0, 7], 7: [7], 999: [500, 500, 3, 999, 999]})
    (data / WNIDS[7] / "broken.jpg").write_bytes(b"no image")
    target = tmp_path / "classes.csv"
    found = evaluated("--dataset", "folder", "--split", "all", "--data_dir", data, "--csv", target)
    assert (found["examples"], found["left_out"]) == (9, 1)
    assert found["accuracy"] == 5 / 9
    assert found["accuracy_interval"] == wilson_interval(5, 9)
    wanted = losses([0, 0, 0, 7, *[999] * 5], [0, 0, 7, 7, 500, 500, 3, 999, 999]).mean()
    assert found["loss"] == pytest.approx(wanted, rel=0.03), "but for what JPEG does to a colour"

    rows = table(target)
    assert [row["label"] for row in rows] == [WNIDS[0], WNIDS[7], WNIDS[999]]
    assert rows[2] == {
        "index": "2",
        "label": WNIDS[999],
        "name": "toilet tissue",
        "count": "5",
        "top1": "2",
        "top5": rows[2]["top5"],
        "accuracy": "0.4",
        "top5_accuracy": rows[2]["top5_accuracy"],
        "mistaken_for": NAMES[500],
        "mistaken_count": "2",
    }
    assert (rows[0]["mistaken_for"], rows[1]["mistaken_for"]) == (NAMES[7], "")
    assert "left out  1 that cannot be decoded" in capsys.readouterr().out


def test_the_answer_may_be_restricted_to_the_classes_of_the_data(evaluated, tmp_path):
    # 8 looks most like 7 of the folder's two classes, but of all classes it is itself.
    data = folder(tmp_path / "data", {7: [8], 300: [300]})
    arguments = ("--dataset", "folder", "--split", "all", "--data_dir", data)
    assert evaluated(*arguments)["accuracy"] == 0.5
    assert evaluated(*arguments, "--restrict_classes")["accuracy"] == 1.0


def stored(name, split, examples, data_dir, config=None):
    make_imagenet_relatives.build(
        name,
        split,
        [
            {"image": io.BytesIO(painted(look)), "file_name": f"{i}.jpg", **labels}
            for i, (look, labels) in enumerate(examples)
        ],
        data_dir,
        config,
    )


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_imagenet_a_and_r_choose_among_their_200_classes(evaluated, tmp_path, capsys, name):
    among = [i for i, c in enumerate(imagenet_classes()) if name[-1] in c.subsets]
    # Images that look like every tenth class of all, each labelled as the nearest of the 200; every
    # second as the one after it.
    looks = list(range(0, 1000, 10))
    nearest = [among[int(np.argmin(squared_distances()[look][among]))] for look in looks]
    labels = [among[(among.index(k) + i % 2) % 200] for i, k in enumerate(nearest)]
    examples = [(look, {"label": WNIDS[k]}) for look, k in zip(looks, labels, strict=True)]
    stored(name, "test", examples, tmp_path)
    # Where two of the 200 are equally near, JPEG decides; so they are not asked for.
    distances = np.sort(squared_distances()[looks][:, among], axis=1)
    assert (distances[:, 0] < distances[:, 1] - 1e-3).sum() > 50
    found = evaluated("--dataset", name, "--data_dir", tmp_path, "--csv", tmp_path / "c.csv")
    ties = int((distances[:, 0] > distances[:, 1] - 1e-3).sum())
    assert abs(found["accuracy"] * 100 - 50) <= ties
    assert found["loss"] == pytest.approx(losses(labels, looks, among).mean(), rel=0.03)
    assert "among 200 of the model's classes" in capsys.readouterr().out
    assert len(table(tmp_path / "c.csv")) == 200


def test_real_labels(evaluated, tmp_path, capsys):
    examples = [
        (3, {"original_label": WNIDS[4], "real_label": [3, 4]}),
        (9, {"original_label": WNIDS[9], "real_label": [900]}),
        (9, {"original_label": WNIDS[9], "real_label": []}),
    ]
    stored("imagenet2012_real", "validation", examples, tmp_path)
    found = evaluated("--dataset", "imagenet2012_real", "--data_dir", tmp_path)
    assert (found["examples"], found["left_out"], found["accuracy"]) == (2, 1, 0.5)
    assert found["loss"] == pytest.approx(losses([[3, 4], [900]], [3, 9]).mean(), rel=0.03)
    assert "1 that have no right label, or cannot be decoded" in capsys.readouterr().out


def test_imagenet_c(evaluated, tmp_path, capsys):
    """Each part holds two images; the second is wrong in all parts of the noises."""
    for corruption in ALEXNET_ERRORS:
        for severity in range(1, 6):
            hidden = 5 if "noise" in corruption else 8
            folder(tmp_path / corruption / str(severity), {7: [7], 8: [hidden]})
    found = evaluated("--dataset", "imagenet_c", "--data_dir", tmp_path)
    wanted = {k: 0.5 / e if "noise" in k else 0.0 for k, e in ALEXNET_ERRORS.items()}
    assert found["corruption_errors"] == pytest.approx(wanted)
    assert found["mean_corruption_error"] == pytest.approx(sum(wanted.values()) / 15)
    assert len(found["parts"]) == 75
    out = capsys.readouterr().out
    assert "150 images in 75 parts" in out
    assert "16 × 16 pixels, bicubic, the whole image" in out
    noise = next(line for line in out.splitlines() if line.startswith("gaussian_noise"))
    assert noise.split()[1:] == ["50.0"] * 6 + [f"{50 / ALEXNET_ERRORS['gaussian_noise']:.1f}"]
    assert out.splitlines()[-1].split()[2:] == ["10.0", f"{100 * sum(wanted.values()) / 15:.1f}"]


def test_a_model_of_imagenet_22k(evaluated, tmp_path, capsys):
    teddy = WNIDS.index("n04399382")
    stored("imagenet_sketch", "test", [(0, {"label": WNIDS[teddy]})], tmp_path)
    found = evaluated("--dataset", "imagenet_sketch", "--data_dir", tmp_path, num_classes=21841)
    assert (found["accuracy"], found["top5"], found["loss"]) == (0, 0, None)
    out = capsys.readouterr().out
    assert "among 999 of the model's classes" in out
    assert "(teddy)" in out


def test_size_and_crop(evaluated, tmp_path, capsys):
    data = folder(tmp_path / "data", {7: [7]})
    arguments = ("--dataset", "folder", "--split", "all", "--data_dir", data)
    assert evaluated(*arguments, "--size", 32)["preprocessing"]["image_size"] == 32
    assert "32 × 32 pixels, bicubic, cropped from a short side of 40" in capsys.readouterr().out
    assert evaluated(*arguments, "--crop_ratio", 0.5)["preprocessing"]["resize_size"] == 32


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "12"], "give a multiple of 8"),
        (["--size", "0"], "--size must be positive"),
        (["--crop_ratio", "1.5"], r"--crop_ratio must be in \(0, 1\]"),
        (["--csv", "nowhere/x.csv"], "is no file in an existing directory"),
        (["--split", "test"], "holds no test/ folder"),
    ],
)
def test_mistakes_are_told(evaluated, tmp_path, arguments, message):
    data = folder(tmp_path / "data", {7: [7, 7], 8: [8, 8]})
    with pytest.raises(UserError, match=message):
        evaluated("--dataset", "folder", "--data_dir", data, *arguments)


def test_what_can_not_be_evaluated_is_refused(evaluated, tmp_path):
    data = folder(tmp_path / "data", {7: [7, 7], 8: [8, 8]})
    arguments = ("--dataset", "folder", "--data_dir", data)
    with pytest.raises(UserError, match="has no classifier"):
        evaluated(*arguments, num_classes=0)
    with pytest.raises(UserError, match="is not one of the model's 2 "):
        evaluated(*arguments, num_classes=2, class_names=("cat", "dog"))
    with pytest.raises(UserError, match="--csv goes with one data set"):
        evaluated("--dataset", "imagenet_c", "--csv", tmp_path / "x.csv")
    for file in data.rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image that can be read"):
        evaluated(*arguments)
