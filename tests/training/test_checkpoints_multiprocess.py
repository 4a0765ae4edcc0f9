"""Two processes save and restore one sharded state, and agree on what is damaged."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

PROCESS = """
    import glob, logging, os, sys
    import jax

    index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from convnext_jax.training.checkpoints import Checkpointer

    # Orbax brings absl, whose handler is there already.
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def values(step):
        return np.random.default_rng(step).normal(size=(8, 4096)).astype(np.float32)

    def state(step):
        return {"w": jax.make_array_from_callback((8, 4096), sharding, lambda i: values(step)[i])}

    with Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, state(step), metadata={"at": step})
    multihost_utils.sync_global_devices("saved")
    if index == 0:  # what the other process wrote, and alone will read again
        for path in glob.glob(f"{directory}/2/state/ocdbt.process_1/d/*"):
            os.truncate(path, os.path.getsize(path) // 2)
    multihost_utils.sync_global_devices("damaged")
    abstract = {"w": jax.ShapeDtypeStruct((8, 4096), np.float32, sharding=sharding)}
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(abstract)
        assert (restored.step, restored.metadata) == (1, {"at": 1})
        for shard in restored.state["w"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), values(1)[shard.index])
        assert checkpointer.save(2, state(2), metadata={})
    assert sorted(os.listdir(directory)) == ["1", "2", "2.damaged"]
    print("process", index, "is done")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(PROCESS))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(index), str(port), str(tmp_path / "ckpt")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        (first, first_log), (second, second_log) = [p.communicate(timeout=120) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert "process 0 is done" in first, first_log
    assert "process 1 is done" in second, second_log
    path = tmp_path / "ckpt" / "2"
    assert f"passing over the damaged checkpoint {path}: process 1 could not read" in first
    assert "passing over" not in second
