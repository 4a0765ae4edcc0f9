"""Two processes train as one does: the same trajectory, one writer, an exact evaluation."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from runs import CONFIG_FILE, checkpoint, column, command

pytest_plugins = ["run_fixtures"]

PROCESS = """
    import sys
    import jax

    # The loader's worker processes import this file.
    if __name__ == "__main__":
        index, port, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, index)
        from convnext_jax import cli, train

        sys.exit(cli.run(train.main, arguments))
"""
DEVICES = "--xla_force_host_platform_device_count="
OVERRIDES = ("--config.total=20 steps", "--config.data.workers=1")


def environment(devices):
    return {**os.environ, "XLA_FLAGS": f"{DEVICES}{devices}"}


def run_two(tmp_path, workdir, *overrides):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(PROCESS))
    arguments = ["--config", str(CONFIG_FILE), "--workdir", str(workdir), *overrides]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(index), str(port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(2),
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    # Of the collectives' own lines each process prints some.
    return [
        "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))
        for out, _ in printed
    ]


@pytest.mark.slow
def test_two_processes_train_as_one(quick, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = subprocess.run(
        command(alone, *OVERRIDES), env=environment(4), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    first, second = run_two(tmp_path, together, *OVERRIDES)

    assert "4 × " in first
    assert "2 processes" in first
    assert "32, 8 a device" in first
    assert "summary" in first
    assert second == ""
    assert len(list((together / "tensorboard").iterdir())) == 1
    lines = (together / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 20 + 2

    for name in ("loss", "grad_norm"):
        wanted = column(alone, name)
        np.testing.assert_allclose(column(together, name), wanted, rtol=1e-4)
        assert len(wanted) == 20
    for name in ("loss", "ema_loss"):
        wanted = column(alone, name, "eval")
        np.testing.assert_allclose(column(together, name, "eval"), wanted, rtol=1e-4)
    assert column(together, "examples", "eval") == [359, 359]
    ours, theirs = checkpoint(together, 20), checkpoint(alone, 20)
    assert ours.keys() == theirs.keys()

    # Started again it goes on as one, too; here from the checkpoint of the single process.
    first, second = run_two(tmp_path, alone, *OVERRIDES, "--config.log_every=2 steps")
    assert "resumed at step 20" in first
    assert second == ""
