"""Checkpoints: exact, kept as asked, restored on other meshes, safe against kills and damage."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convnext_jax.errors import UserError
from convnext_jax.training import checkpoint_reading
from convnext_jax.training.checkpoints import Checkpointer


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    raw_key: jax.Array


def mesh(devices):
    data = max(1, devices // 2)
    return jax.make_mesh(
        (data, devices // data),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )


def make_state(devices=8, seed=0, width=16):
    """A state with every kind of leaf: sharded over both axes, bfloat16, int, both kinds of key."""
    on = mesh(devices)
    rng = np.random.default_rng(seed)

    def put(value, *spec):
        return jax.device_put(value, NamedSharding(on, PartitionSpec(*spec)))

    params = {
        "kernel": put(rng.normal(size=(8, width)).astype(np.float32), "data", "fsdp"),
        "scale": put(rng.normal(size=(width,)).astype(jnp.bfloat16), "fsdp"),
        # Payloads of NaN and a negative zero survive only where bits are copied.
        "odd": put(np.array([0x7FC12345, 0x80000000, 1], np.uint32).view(np.float32)),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    replicated = NamedSharding(on, PartitionSpec())
    return State(
        step=put(np.int32(seed)),
        params=params,
        opt_state=jax.device_put(tx.init(params), replicated),
        key=jax.device_put(jax.random.key(seed), replicated),
        raw_key=jax.device_put(jax.random.PRNGKey(seed + 1), replicated),
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(state):
    def leaf(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return (str(x.dtype), x.shape, np.asarray(x).tobytes())

    return jax.tree.map(leaf, state)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "convnext_jax"]


@pytest.fixture(autouse=True)
def _capture(caplog):
    caplog.set_level(logging.INFO, logger="convnext_jax")


def save_steps(directory, steps, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(seed=step), metadata={"at": step})


def test_a_state_comes_back_bit_for_bit_with_its_metadata(tmp_path):
    state = make_state(seed=7)
    metadata = {"config": {"lr": 0.1, "sizes": [1, 2]}, "chrono": {"seconds": 1 / 3}}
    with Checkpointer(tmp_path / "ckpt") as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore(abstract(state)) is None
        assert checkpointer.save(7, state, metadata=metadata, metrics={"loss": float("nan")})
        assert not checkpointer.save(7, state, metadata={})
    with Checkpointer(tmp_path / "ckpt") as checkpointer:
        assert checkpointer.latest_step() == 7
        restored = checkpointer.restore(abstract(state))
    assert restored.step == 7
    assert restored.metadata == metadata
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
        lambda x: x.sharding, state
    )
    assert jax.random.uniform(restored.state.key) == jax.random.uniform(state.key)


def test_a_checkpoint_may_be_older_than_a_field_that_is_none(tmp_path):
    """As those of networks without batch norms are, from before the state had statistics."""

    @struct.dataclass
    class Newer(State):
        batch_stats: dict | None

    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metadata={})
    fields = {field: getattr(state, field) for field in State.__dataclass_fields__}
    newer = Newer(**fields, batch_stats=None)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract(newer)).state
        assert isinstance(restored, Newer)
        assert bits(restored) == bits(newer)
        filled = dataclasses.replace(newer, batch_stats={"mean": state.params["odd"]})
        with pytest.raises(UserError, match="batch_stats/mean: absent in the checkpoint"):
            checkpointer.restore(abstract(filled))


@pytest.mark.parametrize("devices", [2, 1])
def test_restores_on_another_mesh(tmp_path, devices):
    state = make_state(devices=8, seed=3)
    target = abstract(make_state(devices=devices, seed=4))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metadata={})
        checkpointer.wait()
        restored = checkpointer.restore(target).state
    assert bits(restored) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )
    assert len(restored.params["kernel"].sharding.device_set) == devices


@pytest.mark.parametrize("guard", ["allow", "disallow"])
def test_state_may_be_donated_right_after_save(tmp_path, guard):
    """Large enough that the writing is still under way while the next steps overwrite."""
    sharding = NamedSharding(mesh(8), PartitionSpec("data", "fsdp"))
    expected = np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32)
    state = {"w": jax.device_put(expected.copy(), sharding)}
    target = abstract(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    # Compiled beforehand, so that the donation follows the save at once; and it does donate.
    other = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(overwrite(other))
    assert other["w"].is_deleted()
    with Checkpointer(tmp_path) as checkpointer, jax.transfer_guard(guard):
        checkpointer.save(1, state, metadata={})
        state = jax.block_until_ready(overwrite(state))
        assert not (tmp_path / "1").exists(), "the save was over before the donation"
        for _ in range(5):
            state = overwrite(state)
        jax.block_until_ready(state)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(target)
    np.testing.assert_array_equal(np.asarray(restored.state["w"]), expected)


def test_metadata_is_copied_at_once_and_must_be_json(tmp_path):
    metadata = {"config": {"depth": 1}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), metadata=metadata)
        metadata["config"]["depth"] = 2
        checkpointer.wait()
        assert checkpointer.restore(abstract(make_state())).metadata == {"config": {"depth": 1}}
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.save(2, make_state(), metadata={"x": object()})


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_keeps_the_newest_and_the_best_across_restarts(tmp_path, mode, best):
    options = {"max_to_keep": 2, "best_metric": "score", "best_mode": mode}
    scores = {1: 0.5, 2: 0.9, 3: 0.3, 4: 0.1, 5: float("nan"), 6: 0.4, 7: None, 8: 0.6}
    state = make_state()
    for part in [(1, 2, 3, 4), (5, 6), (7, 8)]:
        with Checkpointer(tmp_path, **options) as checkpointer:
            for step in part:
                metrics = None if scores[step] is None else {"score": scores[step], "other": 1.0}
                checkpointer.save(step, state, metadata={}, metrics=metrics)
    with Checkpointer(tmp_path, read_only=True, **options) as checkpointer:
        assert checkpointer.all_steps() == [best, 7, 8]
        assert checkpointer.best_step() == best
        assert checkpointer.restore(abstract(state), step=best).step == best
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(best), "7", "8"]


def test_of_equally_good_checkpoints_the_newest_is_the_best(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=1, best_metric="accuracy") as checkpointer:
        for step, accuracy in [(1, 1.0), (2, 1.0), (3, 0.5)]:
            checkpointer.save(step, make_state(), metadata={}, metrics={"accuracy": accuracy})
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 3]


def truncate_arrays(step):
    for path in (step / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def remove_arrays(step):
    for path in (step / "state").rglob("d/*"):
        path.unlink()


def garble_metadata(step):
    (step / "metadata" / "metadata").write_text('{"metadata": {"conf')


def remove_metadata(step):
    (step / "metadata" / "metadata").unlink()


def remove_tree(step):
    (step / "state" / "_METADATA").unlink()


def zero_manifest(step):
    path = step / "state" / "manifest.ocdbt"
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [
        truncate_arrays,
        remove_arrays,
        garble_metadata,
        remove_metadata,
        remove_tree,
        zero_manifest,
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, caplog, damage):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    files = sorted(p.relative_to(tmp_path / "3") for p in (tmp_path / "3").rglob("*"))
    with Checkpointer(tmp_path, best_metric="accuracy") as checkpointer:
        restored = checkpointer.restore(abstract(make_state()))
        assert (restored.step, restored.metadata) == (2, {"at": 2})
        assert bits(restored.state) == bits(make_state(seed=2))
        lines = warnings_of(caplog)
        assert len(lines) == 1
        assert lines[0].startswith(f"passing over the damaged checkpoint {tmp_path / '3'}: ")
        assert "\n" not in lines[0]
        assert checkpointer.latest_step() == 2
        # The run goes on from step 2 and comes to step 3 again.
        assert checkpointer.save(3, make_state(seed=3), metadata={"at": "again"})
        checkpointer.wait()
        assert checkpointer.restore(abstract(make_state())).metadata == {"at": "again"}
    kept = tmp_path / "3.damaged"
    assert sorted(p.relative_to(kept) for p in kept.rglob("*")) == files


@pytest.mark.parametrize("keep", [0.999, 0.5])
def test_a_large_array_cut_short_is_damage(tmp_path, caplog, keep):
    """Its values lie apart from its metadata, which is whole; all is found out only by reading."""
    values = np.random.default_rng(0).normal(size=(1024, 256)).astype(np.float32)
    state = {"w": jax.device_put(values, jax.devices()[0])}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metadata={})
        checkpointer.save(2, state, metadata={})
    largest = max((tmp_path / "2").rglob("d/*"), key=lambda p: p.stat().st_size)
    os.truncate(largest, int(largest.stat().st_size * keep))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(state)).step == 1
    (line,) = warnings_of(caplog)
    assert "OUT_OF_RANGE" in line


def test_a_reader_changes_nothing(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    remove_metadata(tmp_path / "2")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.restore(abstract(make_state())).step == 1
        with pytest.raises(ValueError, match="read-only"):
            checkpointer.save(4, make_state(), metadata={})
    assert sorted(tmp_path.rglob("*")) == before
    assert [line.split(":")[0] for line in warnings_of(caplog)] == [
        f"passing over the half-written checkpoint {tmp_path / '3.orbax-checkpoint-tmp'}",
        f"passing over the damaged checkpoint {tmp_path / '2'}",
    ]
    with Checkpointer(tmp_path / "absent", read_only=True) as checkpointer:
        assert checkpointer.restore(abstract(make_state())) is None
    assert not (tmp_path / "absent").exists()


def test_only_damaged_checkpoints_stop_rather_than_start_over(tmp_path):
    save_steps(tmp_path, [1, 2])
    truncate_arrays(tmp_path / "1")
    remove_metadata(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match="every one is damaged"):
            checkpointer.restore(abstract(make_state()))
        with pytest.raises(UserError, match="the checkpoint of step 2 is damaged"):
            checkpointer.restore(abstract(make_state()), step=2)
        with pytest.raises(UserError, match=r"no checkpoint of step 5; it has 1, 2"):
            checkpointer.restore(abstract(make_state()), step=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "error", [PermissionError("denied"), ValueError("UNAVAILABLE: storage is away")]
)
def test_a_checkpoint_out_of_reach_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    save_steps(tmp_path, [1, 2])

    def unreachable(path):
        raise error

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpoint_reading, "read_beside", unreachable)
        with pytest.raises(type(error), match=str(error)):
            checkpointer.restore(abstract(make_state()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metadata={})
        checkpointer.wait()
        with pytest.raises(UserError) as caught:
            checkpointer.restore(abstract(make_state(width=32)))
        message = str(caught.value)
        assert str(tmp_path / "1") in message
        assert "params/kernel: float32[8, 16] in the checkpoint, float32[8, 32] here" in message
        assert "and 1 more" in message

        other = abstract(state)
        other.params["extra"] = other.params.pop("odd")
        other.params["scale"] = jax.ShapeDtypeStruct(
            (16,), jnp.float32, sharding=other.params["scale"].sharding
        )
        with pytest.raises(UserError, match="3 leaves differ") as caught:
            checkpointer.restore(other)
        assert "params/extra: absent in the checkpoint, float32[3] here" in str(caught.value)
        assert "params/odd: float32[3] in the checkpoint, absent here" in str(caught.value)
        assert "params/scale: bfloat16[16] in the checkpoint, float32[16] here" in str(caught.value)


def test_part_of_a_checkpoint(tmp_path):
    state = make_state(seed=5)
    part = {"params": abstract(state).params}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metadata={})
        checkpointer.wait()
        with pytest.raises(UserError, match="opt_state"):
            checkpointer.restore(part)
        restored = checkpointer.restore(part, partial=True)
    assert bits(restored.state) == bits({"params": state.params})


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(UserError, match="max_to_keep is 0"):
        Checkpointer(tmp_path, max_to_keep=0)
    with pytest.raises(UserError, match="best_mode is 'most'"):
        Checkpointer(tmp_path, best_mode="most")


KILLED = """
    import sys, numpy as np, jax, jax.numpy as jnp
    from convnext_jax.training.checkpoints import Checkpointer

    directory, first = sys.argv[1], int(sys.argv[2])
    checkpointer = Checkpointer(directory, max_to_keep=2)
    state = lambda step: {"w": jnp.full((2048, 1024), step, jnp.float32), "step": jnp.int32(step)}
    for step in range(first, first + 1000):
        checkpointer.save(step, state(step), metadata={"at": step})
        print(step, flush=True)
"""


def test_killed_in_the_middle_of_saving(tmp_path, caplog):
    """A writer is killed with SIGKILL at seeded moments; what is restored is always whole."""
    script = tmp_path / "writer.py"
    script.write_text(textwrap.dedent(KILLED))
    directory = tmp_path / "ckpt"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "w": jax.ShapeDtypeStruct((2048, 1024), jnp.float32, sharding=one),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=one),
    }
    rng = np.random.default_rng(0)
    first, half_written = 1, 0
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, str(script), str(directory), str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        started = first
        while started < first + 2:  # the second save has begun, so the first is whole
            started = int(writer.stdout.readline())
        time.sleep(float(rng.uniform(0, 0.05)))
        writer.send_signal(signal.SIGKILL)
        later = writer.communicate()[0].split()
        started = int(later[-1]) if later else started

        caplog.clear()
        left = sorted(p.name for p in directory.iterdir() if not p.name.isdigit())
        with Checkpointer(directory, max_to_keep=2) as checkpointer:
            restored = checkpointer.restore(target)
            # The save announced last, or one whose announcement the kill cut off.
            assert started - 1 <= restored.step <= started + 1
            assert restored.metadata == {"at": restored.step}
            assert int(restored.state["step"]) == restored.step
            np.testing.assert_array_equal(np.asarray(restored.state["w"]), restored.step)
            assert warnings_of(caplog) == [
                f"passing over the half-written checkpoint {directory / name}: "
                "it was never finished"
                for name in left
            ]
        half_written += len(left)
        first = restored.step + 1
    assert half_written > 0, "no kill hit a save; the test shows nothing"


def test_a_run_killed_during_its_first_save_starts_over(tmp_path, caplog):
    (tmp_path / "10.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(make_state())) is None
        assert len(warnings_of(caplog)) == 1
        assert checkpointer.save(10, make_state(), metadata={})
    assert [p.name for p in Path(tmp_path).iterdir()] == ["10"]


def test_the_json_beside_the_arrays_is_plain_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), metadata={"a": 1}, metrics={"x": 0.5, "y": float("inf")})
    text = (tmp_path / "1" / "metadata" / "metadata").read_text()
    assert json.loads(text) == {"metadata": {"a": 1}, "metrics": {"x": 0.5}}


def test_figures_that_came_late_make_a_checkpoint_the_best(tmp_path):
    """As where the run was stopped in the evaluation of that step, which is made up for later."""
    options = {"max_to_keep": 1, "best_metric": "score"}
    state = make_state()
    with Checkpointer(tmp_path, **options) as checkpointer:
        checkpointer.save(1, state, metadata={"at": 1}, metrics={"score": 0.5})
        checkpointer.save(2, state, metadata={"at": 2})
        checkpointer.wait()
        assert checkpointer.best_step() == 1
        checkpointer.add_metrics(2, {"score": 0.75, "loss": float("nan")})
        assert checkpointer.best_step() == 2
    with Checkpointer(tmp_path, **options) as checkpointer:
        assert checkpointer.best_step() == 2
        assert checkpointer.restore(abstract(state)).metadata == {"at": 2}
        # It is the one to keep, then.
        for step in (3, 4):
            checkpointer.save(step, state, metadata={}, metrics={"score": 0.6})
            checkpointer.wait()
        assert checkpointer.all_steps() == [2, 4]
        # What is given last counts.
        checkpointer.add_metrics(2, {"score": 0.1})
        assert checkpointer.best_step() == 4
    assert not list((tmp_path / "2").rglob("*.tmp"))
    with Checkpointer(tmp_path, **options, read_only=True) as checkpointer:
        assert checkpointer.best_step() == 4


def test_figures_that_are_none_make_no_checkpoint_the_best(tmp_path):
    with Checkpointer(tmp_path, best_metric="score") as checkpointer:
        checkpointer.save(1, make_state(), metadata={"at": 1})
        checkpointer.wait()
        checkpointer.add_metrics(1, {"score": float("nan"), "loss": 1.0})
        assert checkpointer.best_step() is None
    with Checkpointer(tmp_path, best_metric="score") as checkpointer:
        assert checkpointer.best_step() is None
        assert checkpointer.metadata(1) == {"at": 1}
