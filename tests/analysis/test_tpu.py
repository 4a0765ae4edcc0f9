"""Topologies by name, and the compiler within libtpu."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.tpu import OutOfHbmError, compile_for_tpu, overflow, tpu_topology
from convnext_jax.analysis.tpu_chips import CHIPS
from convnext_jax.errors import UserError


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5e", "v5e:", "v5e:4", "v5e:2x2x2", "v4:4x4", "v5e:0x4", "v5e:axb", "4x4"]
)
def test_a_topology_that_is_none(name):
    with pytest.raises(UserError, match="CHIP:SHAPE, where the chip is v5e, v6e with a shape like"):
        tpu_topology(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'convnext-jax[plan]'")):
        tpu_topology("v5e:2x2")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded", (20.5 * 2**30, 15.75 * 2**30)),
        ("temporaries (512.00M) exceeds available HBM (256K).", (512 * 2**20, 256 * 2**10)),
        ("something else", (None, None)),
    ],
)
def test_what_an_overflow_says(text, found):
    assert overflow(text) == found


def test_clocks_are_those_of_chips():
    assert {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()} == {
        "v4": 1.05,
        "v5e": 1.50,
        "v5p": 1.75,
        "v6e": 1.75,
    }


@pytest.fixture
def compiler():
    pytest.importorskip("libtpu")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("name", "hosts"), [("v5e:1x1", 1), ("v5e:4x4", 4), ("v6e:2x4", 2), ("v4:2x2x2", 2)]
)
def test_a_topology_has_a_device_for_each_chip(compiler, name, hosts):
    topology = tpu_topology(name)
    assert len(topology.devices) == len({str(d.coords) for d in topology.devices})
    assert len(topology.devices) == jnp.prod(jnp.array(topology.shape))
    assert topology.hosts == hosts == len({d.process_index for d in topology.devices})


@pytest.mark.tpu_compiler
def test_a_topology_that_libtpu_does_not_know(compiler):
    with pytest.raises(UserError, match=r"libtpu knows no topology 'v5e:3x5'"):
        tpu_topology("v5e:3x5")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("chip", "shape"), [("v4", "1x1x1"), ("v5e", "1x1"), ("v6e", "1x1")])
def test_the_table_agrees_with_the_compiler(compiler, chip, shape):
    device = tpu_topology(f"{chip}:{shape}").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(side, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((side, side), dtype, sharding=sharding)

    # A product of large matrices comes near the peak, and never above it.
    side = 4096
    product = compile_for_tpu(jax.jit(lambda x, y: x @ y), array(side), array(side))
    cycles = sum(one.total_cycles for one in operations(product.as_text()))
    assert 0.6 < 2 * side**3 / (cycles / CHIPS[chip].clock) / CHIPS[chip].peak_flops < 1

    # One pass through the memory comes near its bandwidth.
    side = 2**14
    raised = compile_for_tpu(jax.jit(lambda x: x + 1), array(side, jnp.float32))
    cycles = sum(one.total_cycles for one in operations(raised.as_text()))
    assert 0.6 < 2 * 4 * side**2 / (cycles / CHIPS[chip].clock) / CHIPS[chip].hbm_bandwidth < 1

    with pytest.raises(OutOfHbmError) as refused:
        compile_for_tpu(jax.jit(lambda x: x + 1), array(2**20))
    assert refused.value.available == CHIPS[chip].usable_hbm_bytes
    assert refused.value.needed == 2 * 2 * 2**40  # the argument and the result
