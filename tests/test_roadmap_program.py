"""The table of the road from ResNet to ConvNeXt, its chart, and the column of TPU estimates."""

import csv
import importlib.util
import json
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from convnext_jax import cli, roadmap, tpu_estimates
from convnext_jax.analysis.estimate_cache import InferenceEstimate
from convnext_jax.analysis.roadmap_table import RoadmapRow, is_kept
from convnext_jax.analysis.tpu import OutOfHbmError, TpuTopology
from convnext_jax.analysis.tpu_chips import CHIPS
from convnext_jax.models.roadmap_steps import ROADS, STEPS, Published
from convnext_jax.roadmap_chart import draw_roadmap

ESTIMATE = InferenceEstimate(12345.6, 128, 1e6, 0.0)
# GFLOPs as counted where the paper's differ, the paper's, top-1 (tables 10 and 11).
PAPER = {
    "00_resnet": ("4.09", "4.09", "76.13"),
    "04_depthwise_conv": ("2.35", "2.35", "78.28"),
    "10_kernel_9 ×": ("4.21", "4.21", "80.57"),
    "15_layer_norm": ("4.15", "4.46†", "81.47"),
    "16_convnext": ("4.46", "4.49†", "81.97"),
    "swin_tiny": ("4.49", "4.50†", "81.30"),
}


def run(*arguments: str) -> int:
    return cli.run(roadmap.main, list(arguments))


def cells(printed, step):
    (line,) = [one for one in printed.splitlines() if one.startswith(f"| {step}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_road_in_text_and_files(tmp_path, capsys):
    steps = [name.partition(" ")[0] for name in list(PAPER)[:-1]]
    files = {kind: tmp_path / f"road.{kind}" for kind in ("csv", "json", "png")}
    outputs = ["--csv", str(files["csv"]), "--json", str(files["json"])]
    outputs += ["--chart", str(files["png"])]
    assert run("--no_estimate", "--steps", *steps, *outputs) == 0
    printed = capsys.readouterr().out
    for step, (counted, published, top1) in PAPER.items():
        assert cells(printed, step)[3:] == [counted, published, top1]
    assert cells(printed, "16_convnext")[2] == "28,589,128"
    assert "From ResNet-50 to ConvNeXt-T" in printed
    assert re.search(r"† The paper's .* 4.15 and 4.46 are counted.*Table 11", printed, re.DOTALL)
    assert "× Tried, and taken back later." in printed
    assert "TPU estimates left out by --no_estimate" in printed

    rows = json.loads(files["json"].read_text())
    assert [row["model"] for row in rows] == [f"roadmap_t/{step}" for step in steps] + ["swin_tiny"]
    with files["csv"].open() as file:
        assert [row["parameters"] for row in csv.DictReader(file)] == [
            str(row["parameters"]) for row in rows
        ]
    with Image.open(files["png"]) as chart:
        assert chart.size == (1500, 990)
        assert len(chart.convert("RGB").getcolors(1 << 20)) > 20

    assert run("--no_estimate", *outputs) == 2
    assert "road.png exists already; give another name, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("road", ROADS)
def test_larger_kernels_were_not_kept(road):
    assert [s.name for s in STEPS if not is_kept(road, s)] == ["10_kernel_9", "11_kernel_11"]


def test_a_drawing_is_reproducible(tmp_path):
    def row(name, kept=True, counted=4.0):
        return RoadmapRow(
            f"roadmap_t/{name}", "", kept, 1, int(counted * 1e9), Published(80.0, 4.0)
        )

    rows = [row("one"), row("two", kept=False), row("three", counted=5.0)]
    for name in ("a.svg", "b.svg"):
        draw_roadmap(rows, row("end"), tmp_path / name, title="Title", reference_name="Swin")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--steps", "07_dw"], "--steps: there is no '07_dw'; there are 00_resnet, 01_"),
        (["--chart", "road.pdf"], "give a name that ends in .png or .svg"),
        (["--csv", "nowhere/road.csv"], "there is no directory nowhere"),
        (["--tpu_batch_size=0"], "--tpu_batch_size is 0; it must be 1 or more"),
        (["--no_estimate", "--topology=v5e:1x1"], "--no_estimate goes with neither"),
        (["--topology=v9:1x1"], "'v9:1x1' is no topology"),
        (["--estimates=nowhere/estimates.json"], "there is no directory nowhere"),
        (["--estimates", __file__], "holds no estimates of this program"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, wanted, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert error.count("\n") == 1


def test_without_the_tpu_compiler(monkeypatch, capsys):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--steps", "00_resnet") == 0
    printed = capsys.readouterr().out
    assert "TPU estimates left out" in printed
    assert "pip install 'convnext-jax[plan]'" in printed
    assert len(cells(printed, "00_resnet")) == 6
    assert run("--steps", "00_resnet", "--topology=v5e:1x1") == 2


def test_the_column_of_estimates(monkeypatch, capsys):
    asked = []

    def estimate(model, topology, *, image_size, batch_size, cache, label):
        asked.append((label, image_size, batch_size, str(model.dtype.dtype)))
        if label == "swin_base":
            raise OutOfHbmError(2, 1, "")
        return ESTIMATE

    topology = TpuTopology("v5e:1x1", CHIPS["v5e"], (1, 1), ())
    monkeypatch.setattr(tpu_estimates, "tpu_topology", lambda name: topology)
    monkeypatch.setattr(tpu_estimates, "estimate_inference", estimate)
    assert run("--road=b", "--steps", "16_convnext", "--tpu_batch_size=64") == 0
    printed = capsys.readouterr().out
    assert asked == [
        ("roadmap_b/16_convnext", 224, 64, "bfloat16"),
        ("swin_base", 224, 64, "bfloat16"),
    ]
    assert cells(printed, "step")[-1] == "v5e images/s, est."
    assert cells(printed, "16_convnext")[-1] == "12,346"
    assert cells(printed, "swin_base")[-1] == "too large"
    assert "64 images of 224 × 224 a batch, one v5e chip; the compiler's estimates" in printed
