"""configs/tiny.py as on a pod, but for batch size and steps: real photographs, and a kill."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_bitwise_equal, checkpoint, records

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet-sample"
SETTINGS = [
    "--config.batch_size=8",
    "--config.eval_batch_size=20",
    "--config.total=12 steps",
    "--config.optim.warmup=2 steps",
    "--config.log_every=1 step",
    "--config.checkpoint_every=4 steps",
    "--config.eval_every=12 steps",
]


@pytest.mark.nightly
@pytest.mark.skipif(
    not PHOTOGRAPHS.is_dir(), reason="the sample of ImageNet is not on this machine"
)
def test_tiny_trains_is_killed_and_goes_on(tmp_path):
    script = ROOT / "tests" / "data" / "make_imagenet_like.py"
    subprocess.run(
        [sys.executable, str(script), f"--images={PHOTOGRAPHS}", f"--data_dir={tmp_path / 'data'}"],
        check=True,
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}

    def command(workdir):
        program = [sys.executable, "-m", "convnext_jax.train", "--config", "configs/tiny.py"]
        data = f"--config.data.data_dir={tmp_path / 'data'}"
        return [*program, "--workdir", str(workdir), data, *SETTINGS]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, env=environment, check=True)

    metrics = killed / "metrics.jsonl"
    with subprocess.Popen(command(killed), cwd=ROOT, env=environment) as process:
        while not metrics.exists() or '"step": 6,' not in metrics.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    subprocess.run(command(killed), cwd=ROOT, env=environment, check=True)

    assert '{"kind": "resume", "step": 4}' in metrics.read_text()
    assert records(killed) == records(whole)
    evaluation = records(whole)[-1]
    assert evaluation["examples"] == 100
    arrays = checkpoint(whole, 12)
    assert_bitwise_equal(checkpoint(killed, 12), arrays)
    print(f"{len(records(whole))} records and {len(arrays)} arrays are equal, bit for bit")
