"""The GPU's benchmark on the CPU, on small shapes: it runs, and its figures hang together."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity
for package in ("torch", "timm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments):
    program = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=600)


def test_it_compares_both_ways_of_both_modes(tmp_path):
    path = tmp_path / "gpu.json"
    done = run(
        *("--device", "cpu", "--tiny_shapes", "--models", "convnext_tiny", "--timm", "eager"),
        *("--rounds", "3", "--turn_seconds", "0.01", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(path.read_text())["records"]
    found = [(one["mode"], one["contender"]) for one in records]
    contenders = ("convnext_jax", "timm, eager")
    assert found == [(mode, name) for mode in ("inference", "training") for name in contenders]
    for one in records:
        assert len(one["images_per_second"]) == 3
        assert all(rate > 0 for rate in one["images_per_second"])
        assert (one["peak_bytes"] is None) == (one["contender"] != "convnext_jax")
        seconds = [each for _, each in one["profile"]]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] > 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("| convnext_tiny")]
    assert len(rows) == 4
    parts = {part for part, _ in records[2]["profile"]}
    assert any("dwconv" in part and part.endswith("backward") for part in parts)
    assert any("convolution" in operation for operation, _ in records[3]["profile"])


def test_without_a_gpu_it_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run()
    assert done.returncode == 2
    assert "both JAX and PyTorch must see a GPU" in done.stderr
