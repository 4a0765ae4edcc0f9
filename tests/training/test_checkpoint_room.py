"""What is in the way of a checkpoint is seen before it is begun, and all processes agree."""

import os
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils

from convnext_jax.training import checkpoint_room
from convnext_jax.training.checkpoint_room import obstacle

Usage = namedtuple("Usage", "total used free")
MIB = 2**20


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(
            checkpoint_room.shutil, "disk_usage", lambda path: Usage(count, 0, count)
        )

    return set_free


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path)


STATE = {
    "params": jnp.zeros((2, MIB), jnp.float32),
    "moment": jnp.zeros((MIB,), jnp.bfloat16),
    "step": jnp.int32(3),
}


def test_nothing_is_in_the_way(directory):
    assert obstacle(directory, STATE) is None
    assert os.listdir(directory) == []


def test_a_full_disk(directory, free):
    needed = 2 * MIB * 4 + MIB * 2 + 4
    free(needed)
    assert obstacle(directory, STATE) is None
    free(needed - 1)
    assert obstacle(directory, STATE) == (
        f"it takes up to 10 MiB, and 10 MiB are free in {directory}"
    )
    free(3 * MIB)
    assert obstacle(directory, STATE).endswith(f"and 3 MiB are free in {directory}")


def test_keys_and_sharded_arrays_count_once(directory, free):
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {
        "spread": jax.device_put(np.zeros(800, np.float32), spread),
        "everywhere": jax.device_put(np.zeros(100, np.float32), everywhere),
        "key": jax.random.key(0),
    }
    needed = 3200 + 400 + 8
    free(needed)
    assert obstacle(directory, state) is None
    free(needed - 1)
    assert obstacle(directory, state) is not None


def test_a_directory_that_is_none_any_more(directory):
    gone = directory / "checkpoints"
    assert obstacle(gone, STATE) == f"{gone} is no longer a directory"
    gone.write_text("a file")
    assert obstacle(gone, STATE) == f"{gone} is no longer a directory"


def test_a_directory_that_is_not_writable(directory, monkeypatch):
    # By hand, since the superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert obstacle(directory, STATE) == f"{directory} is not writable"


def test_a_mount_that_has_gone(directory, monkeypatch):
    def disk_usage(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint_room.shutil, "disk_usage", disk_usage)
    assert obstacle(directory, STATE) == f"{directory} can't be looked at (Stale file handle)"


def test_of_a_bucket_nothing_is_asked(free):
    free(0)
    assert obstacle(epath.Path("gs://bucket/run/checkpoints"), STATE) is None


@pytest.mark.parametrize("process", [0, 1, 2])
@pytest.mark.parametrize(
    ("hindered", "found"),
    [
        ([], None),
        ([1, 2], "on process 1 {} is not writable by 1"),
        ([0, 2], "{} is not writable by 0"),
    ],
)
def test_several_processes_agree(directory, monkeypatch, process, hindered, found):
    """The allgather is played: whoever asks, all answers are there."""
    clauses = [f"{directory} is not writable by {i}" if i in hindered else None for i in range(3)]
    sent = []

    def process_allgather(mine):
        for clause in clauses:
            row = np.zeros(500, np.uint8)
            text = (clause or "").encode()
            row[: len(text)] = list(text)
            sent.append(row)
        np.testing.assert_array_equal(mine, sent[process])
        return np.stack(sent)

    monkeypatch.setattr(checkpoint_room, "_obstacle", lambda *arguments: clauses[process])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    with jax.transfer_guard("disallow"):
        assert obstacle(directory, STATE) == (found and found.format(directory))


def test_a_clause_of_any_length_goes_round(directory, monkeypatch):
    monkeypatch.setattr(checkpoint_room, "_obstacle", lambda *arguments: "é" * 1000)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine] * 2))
    assert obstacle(directory, STATE) == "é" * 250
