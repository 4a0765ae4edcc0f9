"""Estimates of inference, of a compiler that is played by the test; and of the true one."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from convnext_jax.analysis import inference_cost
from convnext_jax.analysis.estimate_cache import EstimateCache
from convnext_jax.analysis.inference_cost import estimate_inference
from convnext_jax.analysis.tpu import TpuTopology, tpu_topology
from convnext_jax.analysis.tpu_chips import CHIPS
from convnext_jax.errors import UserError
from convnext_jax.models import create_model

TEXT = """HloModule jit_inference, is_scheduled=true

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %conv = f32[1024]{0} fusion(%x), backend_config={"estimated_cycles":"3000000"}
  ROOT %kernel = f32[4096]{0} custom-call(%conv), custom_call_target="tpu_custom_call"
}
"""


def narrow(**overrides):
    return create_model(
        "roadmap_t/07_dw_first", depths=(1, 1), width=8, dtype=jnp.bfloat16, **overrides
    )


def estimate(model, topology, cache=None, batch_size=8):
    return estimate_inference(
        model, topology, image_size=32, batch_size=batch_size, cache=cache, label="narrow"
    )


def test_what_has_been_estimated_is_not_compiled_again(tmp_path, monkeypatch):
    compiled = []

    def compile_for_tpu(function, *arguments):
        compiled.append(arguments)
        return SimpleNamespace(as_text=lambda: TEXT)

    monkeypatch.setattr(inference_cost, "compile_for_tpu", compile_for_tpu)
    chip = CHIPS["v5e"]
    topology = TpuTopology("v5e:1x1", chip, (1, 1), tuple(jax.devices()[:1]))
    path = tmp_path / "estimates.json"
    first = estimate(narrow(), topology, EstimateCache(path))
    assert first.images_per_second == pytest.approx(8 * chip.clock / 3e6)
    assert first.without_estimate == 1
    (_, images), *_ = compiled
    assert (images.shape, images.dtype) == ((8, 32, 32, 3), jnp.bfloat16)

    assert estimate(narrow(), topology, EstimateCache(path)) == first
    assert len(compiled) == 1
    # Whatever changes the program is another entry.
    estimate(narrow(kernel_size=5), topology, EstimateCache(path))
    estimate(narrow(), topology, EstimateCache(path), batch_size=4)
    other = TpuTopology("v6e:1x1", CHIPS["v6e"], (1, 1), topology.devices)
    assert estimate(narrow(), other, EstimateCache(path)) != first
    assert len(compiled) == 4
    labels = {entry["label"] for entry in json.loads(path.read_text())["estimates"].values()}
    assert "narrow, 8 images of 32 on v6e:1x1" in labels


@pytest.mark.parametrize("text", ["{", "[]", '{"estimates": {"a": {"estimate": {"b": 1}}}}', "1"])
def test_a_file_that_is_none(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no estimates of this program"):
        EstimateCache(path)
    assert path.read_text() == text


@pytest.mark.tpu_compiler
def test_the_tpu_compiler():
    pytest.importorskip("libtpu")
    topology = tpu_topology("v5e:1x1")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        few, many = (estimate(narrow(), topology, batch_size=size) for size in (8, 64))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert few.cycles < many.cycles
    # More images use the chip better, and no program is above its peak.
    assert few.images_per_second < many.images_per_second
