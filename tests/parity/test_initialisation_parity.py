"""What fresh networks do to images, layer by layer: ours against PyTorch's, ten seeds each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_convnext import ConvNeXt as TorchConvNeXt  # noqa: E402

from convnext_jax.convert.layouts.official import OFFICIAL  # noqa: E402
from convnext_jax.models.convnext import ConvNeXt  # noqa: E402

pytestmark = pytest.mark.parity

SEEDS = 10
DEPTHS, DIMS, CLASSES = (1, 1, 2, 1), (24, 48, 96, 192), 50
VERSIONS = {1: (1e-6, False), 2: (0.0, True)}
# Some 60 means and variances are compared. Student's t of 18 degrees of freedom exceeds 6 once in
# 90,000 draws, so that a right initialisation fails once in 1,500 choices of seeds.
THRESHOLD = 6.0
# Layer norms leave a mean of 0 and a variance of 1 whatever the weights: differences below this are
# rounding, not sampling.
ROUNDING = 1e-5


def images():
    return np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)


def layer_names(version):
    """Our modules' paths by the authors' names; a block itself stands for its output."""
    names = {
        name.rpartition(".")[0]: path.rpartition("/")[0]
        for name, path, _ in OFFICIAL.tensors(DEPTHS)
    }
    return {k: v for k, v in names.items() if version == 2 or not k.endswith(".grn")}


def statistics(values):
    """Mean in units of the standard deviation, and log variance: what is additive in errors."""
    variance = values.var()
    return [values.mean() / variance**0.5, 0.5 * math.log(variance)]


@functools.cache
def our_activations(version):
    """From a key and a σ to each layer's output, compiled."""
    layer_scale, grn = VERSIONS[version]
    model = ConvNeXt(
        num_classes=CLASSES, depths=DEPTHS, dims=DIMS, layer_scale_init=layer_scale, use_grn=grn
    )
    pixels, paths = jnp.asarray(images()), layer_names(version)

    def activations(key, std):
        variables = model.init(key, pixels)
        scaled = jax.tree.map(lambda p: p * (std / 0.02) if p.ndim > 1 else p, variables)
        _, seen = model.apply(scaled, pixels, capture_intermediates=True, mutable="intermediates")
        outputs = {}
        for name, path in paths.items():
            node = seen["intermediates"]
            for module in path.split("/"):
                node = node[module]
            outputs[name] = node["__call__"][0]
        return outputs

    return jax.jit(activations)


def ours(version, std=0.02):
    found = []
    for seed in range(SEEDS):
        seen = jax.device_get(our_activations(version)(jax.random.key(seed), jnp.float32(std)))
        found.append([statistics(seen[name].astype(np.float64)) for name in layer_names(version)])
    return np.array(found)


@pytest.fixture(scope="module", params=VERSIONS)
def pytorch(request):
    version = request.param
    layer_scale, grn = VERSIONS[version]
    pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = TorchConvNeXt(CLASSES, DEPTHS, DIMS, layer_scale=layer_scale, use_grn=grn)
        seen = {}

        def keep(module, inputs, output, name, seen=seen):
            seen[name] = output

        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(keep, name=name))
        with torch.no_grad():
            model(pixels)
        found.append([statistics(seen[name].double().numpy()) for name in layer_names(version)])
    return version, np.array(found)


def student(a, b):
    """t of each mean and log variance (layers, 2) between two samples (seeds, layers, 2)."""
    error = np.sqrt(a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b))
    return np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.maximum(error, ROUNDING)


def test_activations_of_a_fresh_network_are_distributed_as_pytorchs(pytorch):
    version, theirs = pytorch
    t = student(ours(version), theirs)
    names = list(layer_names(version))
    worst = np.unravel_index(t.argmax(), t.shape)
    print(
        f"V{version}: {t.size} statistics, the largest t {t.max():.1f} "
        f"({('mean', 'variance')[worst[1]]} of {names[worst[0]]}), root mean square of t "
        f"{np.sqrt((t**2).mean()):.2f}"
    )
    assert t.max() < THRESHOLD


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_five_percent_of_the_standard_deviation_would_show(pytorch, factor):
    version, theirs = pytorch
    t = student(ours(version, std=0.02 * factor), theirs)
    seen = int((t > THRESHOLD).sum())
    print(f"V{version}, σ × {factor}: {seen} of {t.size} beyond, the largest t {t.max():.0f}")
    assert seen >= 5


def test_what_is_compared_is_what_the_model_computes():
    """Every module of the network that has parameters is among the layers."""
    for version, (layer_scale, grn) in VERSIONS.items():
        model = ConvNeXt(
            num_classes=CLASSES, depths=DEPTHS, dims=DIMS, layer_scale_init=layer_scale, use_grn=grn
        )
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images()))["params"]
        owners = {
            jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        }
        assert owners <= set(layer_names(version).values())
