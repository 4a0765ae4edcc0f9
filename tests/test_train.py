"""The training program on runs of seconds: what it computes, says, writes and refuses."""

import json
import math
import re
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image
from runs import (
    assert_bitwise_equal,
    checkpoint,
    column,
    command,
    digit_folder,
    records,
    tiny,
)
from traces import Trace

from convnext_jax import experiment
from convnext_jax.compilation_cache import cache_directory
from convnext_jax.config_checks import FREE_FIELDS
from convnext_jax.errors import RunStoppedError, UserError
from convnext_jax.train import train
from convnext_jax.training.sharding import create_mesh
from convnext_jax.training.state import abstract_state

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quick")
LAST = 40


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level("INFO", logger="convnext_jax")


# What a person sees.


def test_start_up_report(finished):
    report = dict(
        line.split(maxsplit=1)
        if not line.startswith(("training set", "evaluation set"))
        else (line[: line.index(" set") + 4], line.split(" set", 1)[1].strip())
        for line in finished.out.split("\n\n", 1)[0].splitlines()
    )
    assert report["model"] == "convnext_atto, 10 classes, float32"
    leaves = {
        k: v for k, v in checkpoint(finished.workdir, LAST).items() if k.startswith("params/")
    }
    assert report["parameters"] == f"{sum(v.size for v in leaves.values()):,}"
    assert "MACs" in report
    assert report["MACs"].endswith("at 8 × 8 pixels")
    assert float(report["MACs"].split()[0]) > 0
    assert report["devices"].startswith("8 × ")
    assert report["mesh"] == "data 8, fsdp 1"
    assert report["batch"] == "32, 4 a device"
    assert report["training set"] == "1,438 images of digits 'train'"
    assert report["evaluation set"] == "359 images of 'validation', 2 steps"
    assert report["steps"] == "40 (44 an epoch, warm-up 4)"
    assert report["compilation"].removeprefix("cache").strip() == str(cache_directory())
    assert report["workdir"] == f"{finished.workdir}, a new run"


def test_progress_and_summary(finished):
    progress = [line for line in finished.out.splitlines() if "  lr " in line]
    assert [line.split("/")[0].split()[-1] for line in progress] == [
        str(step) for step in range(1, LAST + 1)
    ]
    losses = column(finished.workdir, "loss")
    for line, loss in zip(progress, losses, strict=True):
        assert f"loss {loss:.4f}" in line
        assert "epoch" in line
    for line in progress[1:]:
        assert "img/s" in line
        assert "/device)" in line
        assert "waiting" in line
        assert "eta" in line
    evaluations = [line for line in finished.out.splitlines() if "evaluation  " in line]
    assert len(evaluations) == 4
    assert all("ema accuracy" in line for line in evaluations)
    summary = finished.out.split("\nsummary\n")[1]
    last = column(finished.workdir, "ema_accuracy", "eval")[-1]
    assert f"last {last:.2%}" in summary
    for row in ("wall time", "throughput", "checkpoints", "metrics", "tensorboard", "curves"):
        assert row in summary


def test_files(finished):
    names = {path.name for path in finished.workdir.iterdir()}
    assert names == {"checkpoints", "config.json", "curves.png", "metrics.jsonl", "tensorboard"}
    kept = {path.name for path in (finished.workdir / "checkpoints").iterdir()}
    # The three newest; the best one may lie before them.
    assert {"20", "30", "40"} <= kept <= {"10", "20", "30", "40"}
    (events,) = (finished.workdir / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert events.stat().st_size > 1000
    with Image.open(finished.workdir / "curves.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    config = json.loads((finished.workdir / "config.json").read_text())
    assert config["optim"]["warmup"] == "4 steps"
    metadata = next((finished.workdir / "checkpoints" / "40" / "metadata").rglob("metadata"))
    beside = json.loads(metadata.read_text())["metadata"]
    assert beside["config"] == config
    assert beside["data"]["train"]["num_examples"] == 1438
    assert beside["data"]["eval"]["num_examples"] == 359


def test_metrics(finished):
    found = records(finished.workdir)
    assert sum(r["kind"] == "train" for r in found) == LAST
    schedule = [r["learning_rate"] for r in found if r["kind"] == "train"]
    assert schedule[0] == 0
    assert schedule[4] == pytest.approx(4e-3)
    assert sorted(schedule[4:], reverse=True) == schedule[4:]
    evaluations = [r for r in found if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [10, 20, 30, 40]
    for r in evaluations:
        # Two batches of 200 hold the 359 images and 41 rows of padding.
        assert r["examples"] == 359
        for name in ("accuracy", "top5", "ema_accuracy", "ema_top5"):
            hits = r[name] * 359
            assert hits == pytest.approx(round(hits), abs=1e-6)
        assert math.isfinite(r["loss"])
        assert math.isfinite(r["ema_loss"])
    assert evaluations[-1]["loss"] != evaluations[-1]["ema_loss"]


# What it computes.


@pytest.mark.slow
def test_the_seed_decides(finished, tmp_path, capsys):
    """Also where the program is the first run's, out of the compilation cache."""
    result = train(tiny(), tmp_path / "same")
    assert re.search(
        r"^first step after \d+ s, from the compilation", capsys.readouterr().out, re.M
    )
    assert records(tmp_path / "same") == records(finished.workdir)
    assert_bitwise_equal(checkpoint(tmp_path / "same", LAST), checkpoint(finished.workdir, LAST))
    last = records(finished.workdir)[-1]
    assert result["step"] == LAST
    assert result["skipped"] == 0
    for name in ("accuracy", "top5", "loss", "ema_accuracy", "ema_loss", "examples"):
        assert result[name] == last[name]

    train(tiny(seed=1, total="5 steps", data__eval_split=""), tmp_path / "other")
    others = column(tmp_path / "other", "loss")
    assert len(others) == 5
    assert all(a != b for a, b in zip(others, column(finished.workdir, "loss")[:5], strict=True))


@pytest.mark.slow
def test_accumulation_and_fsdp_change_nothing(tmp_path):
    # Wide enough that some leaves are large enough to be cut, and without stochastic depth, whose
    # draws do depend on the micro-batch.
    fields = {
        "model__drop_path_rate": 0.0,
        "model__overrides": {"depths": (1,), "dims": (64,), "patch_size": 1},
        "data__eval_split": "",
        "total": "6 steps",
        "optim__warmup": "2 steps",
    }
    config = tiny(**fields, mesh__fsdp=2)
    mesh = create_mesh(-1, 2)
    model = experiment.build_model(config, 10, 8)
    steps = experiment.durations(config, 1438)
    optimizer, _ = experiment.build_optimizer(config, model, steps)
    state = abstract_state(model, optimizer, (8, 8, 3), mesh, ema=True)
    cut = [x for x in jax.tree.leaves(state) if "fsdp" in x.sharding.spec]
    assert len(cut) >= 4  # a parameter, its two moments and its average

    train(tiny(**fields), tmp_path / "whole")
    train(tiny(**fields, optim__accumulation_steps=2), tmp_path / "accumulated")
    train(config, tmp_path / "fsdp")
    for other in ("accumulated", "fsdp"):
        for name in ("loss", "grad_norm"):
            wanted = column(tmp_path / "whole", name)
            np.testing.assert_allclose(column(tmp_path / other, name), wanted, rtol=1e-5)
            assert len(wanted) == 6
    assert len(set(column(tmp_path / "whole", "loss"))) == 6


# A trace.


def test_a_trace_shows_that_metrics_stay_on_the_devices(finished, tmp_path, capsys):
    """Steps 10 to 14, of which 12 is logged; the program is that of the finished run."""
    config = tiny(log_every="4 steps", checkpoint_every="40 steps", data__eval_split="")
    train(config, tmp_path, profile=range(10, 15))
    assert "traced steps 10 to 14; to look at them" in capsys.readouterr().out
    trace = Trace(tmp_path / "tensorboard")
    assert list(trace.steps) == [10, 11, 12, 13, 14]
    assert not trace.named("compile")
    # What the host fetches it fetches at the log line, behind step 12 and before step 13.
    fetched = trace.named("np.asarray(jax.Array)", "copy_to_host_async")
    assert len(fetched) >= 4 * 4  # four metrics of four steps
    between = trace.steps[12].end, trace.steps[13].start
    assert all(between[0] <= one.start and one.end <= between[1] for one in fetched)
    # The losses are those of a run that is not traced.
    losses = column(finished.workdir, "loss")
    means = [np.mean(losses[i : i + 4]) for i in range(0, LAST, 4)]
    np.testing.assert_allclose(column(tmp_path, "loss"), means, rtol=1e-12)


# Not finite.

# Head weights so large that the gradient's norm overflows float32 in a few of the first steps, of
# which step 2 is the first, and in no other; and so large that it overflows in every step.
NOW_AND_THEN = {"model__head_init_scale": 2e18, "seed": 5}
ALWAYS = 1e30


def all_finite(workdir):
    found = 0
    for path in (workdir / "checkpoints").iterdir():
        for name, array in checkpoint(workdir, int(path.name)).items():
            assert np.isfinite(array).all(), f"{path.name}: {name}"
        found += 1
    return found


def test_stops_at_a_gradient_that_is_not_finite(tmp_path):
    config = tiny(**NOW_AND_THEN, checkpoint_every="1 step")
    with pytest.raises(RunStoppedError) as stopped:
        train(config, tmp_path)
    message = str(stopped.value)
    assert message.startswith("step 2: the loss is ")
    assert "norm inf" in message
    assert f"checkpoint is that of step 1 in {tmp_path / 'checkpoints'}" in message
    assert "--config.on_nonfinite=skip" in message
    assert all_finite(tmp_path) == 1
    # The advice given works, as given.
    assert "--allow_config_change" in message
    config.on_nonfinite = "skip"
    config.checkpoint_every = "20 steps"
    result = train(config, tmp_path, allow_config_change=True)
    assert result["step"] == LAST
    assert result["skipped"] >= 1


def test_stops_before_there_is_a_checkpoint(tmp_path):
    done = subprocess.run(
        command(tmp_path / "run", f"--config.model.head_init_scale={ALWAYS}"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("stopped: step 1: the loss is ")
    assert "no checkpoint had been written yet" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_leaves_out_steps_that_are_not_finite(tmp_path, capsys):
    config = tiny(**NOW_AND_THEN, on_nonfinite="skip")
    result = train(config, tmp_path)
    lines = [r for r in records(tmp_path) if r["kind"] == "train"]
    skipped = [r["step"] for r in lines if r.get("skipped")]
    assert 2 in skipped
    assert 0 < len(skipped) < 10
    assert result["step"] == LAST
    assert result["skipped"] == len(skipped) == sum(r.get("skipped", 0) for r in lines)
    for r in lines:
        assert math.isfinite(r["grad_norm"]) == (r["step"] not in skipped)
    assert all_finite(tmp_path) >= 3
    arrays = checkpoint(tmp_path, LAST)
    assert arrays["skipped"] == len(skipped)
    assert arrays["step"] == LAST
    # Adam's own count, which the schedule follows, leaves them out as well.
    counts = {int(v) for k, v in arrays.items() if k.endswith("count")}
    assert counts == {LAST - len(skipped)}
    out = capsys.readouterr().out
    assert "left out 1 of the last 1 steps, step 3 the first" in out
    assert f"steps left out  {len(skipped)}, not finite" in out.split("summary")[1]


# What it refuses.


def test_another_config_in_an_old_workdir(finished, copy_of_finished, caplog):
    workdir = copy_of_finished
    changed = tiny(optim__learning_rate=0.001, augment__crop_padding=2)
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError) as refused:
        train(changed, workdir)
    message = str(refused.value)
    assert "optim.learning_rate: 0.004 -> 0.001" in message
    assert "augment.crop_padding: 1 -> 2" in message
    assert "--allow_config_change" in message
    assert message.count("->") == 2
    assert sorted(workdir.rglob("*")) == before

    # It goes on when told. The paddings differ only in the data, so nothing is compiled anew.
    for path in (workdir / "checkpoints" / "40").rglob("*"):
        if path.is_file():
            path.unlink()
    result = train(tiny(augment__crop_padding=2), workdir, allow_config_change=True)
    assert result["step"] == LAST
    assert "augment.crop_padding: 1 -> 2" in caplog.text
    assert json.loads((workdir / "config.json").read_text())["augment"]["crop_padding"] == 2
    assert json.loads((workdir / "config.1.json").read_text())["augment"]["crop_padding"] == 1
    ours, theirs = column(workdir, "loss"), column(finished.workdir, "loss")
    assert ours[:30] == theirs[:30]
    assert ours[30:] != theirs[30:]


def test_some_fields_are_free(copy_of_finished):
    free = {
        "log_every": "7 steps",
        "checkpoints_kept": 2,
        "data__workers": 2,
        "eval_batch_size": 400,
    }
    assert {name.replace("__", ".") for name in free} <= set(FREE_FIELDS)
    assert train(tiny(**free), copy_of_finished)["step"] == LAST
    assert not (copy_of_finished / "config.1.json").exists()


# A folder of images.


@pytest.fixture(scope="module")
def folder_run(finished, tmp_path_factory):
    """Three classes of a folder, one file of it broken, started from the digits' weights."""
    root = tmp_path_factory.mktemp("folder")
    data = digit_folder(root / "digits", 3)
    # Found under a seed that draws it, since an epoch of one step leaves a third of the files out.
    bad = data / "1" / "broken.png"
    bad.write_bytes(b"no image")
    config = tiny(
        data__name="folder",
        data__data_dir=str(data),
        data__validation_fraction=0.25,
        init_from=str(finished.workdir),
        seed=3,
        total="3 steps",
        optim__warmup="1 steps",
        eval_batch_size=24,
        checkpoint_every="3 steps",
    )
    return config, root / "run", bad


def test_a_folder_with_a_broken_image(folder_run, caplog):
    """It is named in the log and counted; the head for other classes is new."""
    config, workdir, bad = folder_run
    assert train(config, workdir)["step"] == 3
    assert f"Cannot decode {bad}" in caplog.text
    assert "the head is new, for 3 classes instead of 10" in caplog.text
    lines = records(workdir)
    assert [r.get("bad_images", 0) for r in lines if r["kind"] == "train"][-1] == 1
    # Of 24, 25 and 24 files 6 each are held out.
    assert [r["examples"] for r in lines if r["kind"] == "eval"] == [18]

    # The run is held to its files from then on.
    extra = bad.with_name("one_more.png")
    extra.write_bytes(bad.read_bytes())
    try:
        with pytest.raises(UserError) as refused:
            train(config, workdir)
    finally:
        extra.unlink()
    message = str(refused.value)
    assert "train fingerprint" in message
    assert "train num_examples: 55 -> 56" in message
    assert "optim" not in message
    assert train(config, workdir)["step"] == 3
