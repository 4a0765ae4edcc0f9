"""The README's first command, to the accuracy that it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convnext_jax.training.reporting import read_metrics

ROOT = Path(__file__).parents[1]


def train_digits(directory, *overrides):
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")},
        "CONVNEXT_JAX_DATA_DIR": str(directory / "data"),
    }
    command = [sys.executable, "-m", "convnext_jax.train", "--config", "configs/digits.py"]
    done = subprocess.run(
        [*command, "--workdir", str(directory / "run"), *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout[-2500:])
    assert done.returncode == 0, done.stderr
    return done.stdout, read_metrics(directory / "run" / "metrics.jsonl")


def numbers(records):
    """What must not depend on the clock."""
    timing = ("seconds", "per_second", "wait_fraction")
    return [{k: v for k, v in r.items() if not k.endswith(timing)} for r in records]


@pytest.mark.slow
def test_reaches_its_accuracy(tmp_path):
    printed, records = train_digits(tmp_path)
    last = [r for r in records if r["kind"] == "eval"][-1]
    assert last["examples"] == 359
    assert last["accuracy"] >= 0.98
    assert last["ema_accuracy"] >= 0.98
    assert f"last {last['accuracy']:.2%}" in printed


@pytest.mark.slow
def test_prints_the_same_numbers_twice(tmp_path):
    short = ("--config.total=20 epochs", "--config.log_every=1 epoch")
    first, second = (train_digits(tmp_path / name, *short)[1] for name in ("first", "second"))
    assert len([r for r in first if r["kind"] == "train"]) == 20
    assert numbers(first) == numbers(second)
