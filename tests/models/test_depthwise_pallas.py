"""The Pallas kernels, in TPU interpret mode, and compiled for every chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.models import depthwise_pallas
from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.depthwise_pallas_columns import Columns, columns
from convnext_jax.models.depthwise_pallas_tiles import (
    LANES,
    VMEM_BYTES,
    Tiling,
    bands,
    taps,
    tiling,
)

INTERPRET = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
# JAX tells by a private name alone whether it has seen a race.
interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")


def arrays(shape, k, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    kernel_shape = (k, k, 1, shape[-1])
    shapes = (shape, kernel_shape, shape)
    return [jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True)]


def value_and_gradients(x, kernel, g):
    """By XLA, in float32."""
    x, kernel, g = (a.astype(jnp.float32) for a in (x, kernel, g))
    y, vjp = jax.vjp(lambda x, kernel: depthwise_conv(x, kernel, implementation="xla"), x, kernel)
    return y, *vjp(g)


def without_races(function, *arguments):
    """Runs a kernel in interpret mode, which raises on reads out of bounds, and counts races."""
    result = jax.block_until_ready(function(*arguments, interpret=INTERPRET))
    assert not interpreter.races.races_found
    return result


# Whole images in one product, below and above the kernel's size; blocks in turn; a single block,
# and the last of several, that reach below the image.
SMALL, ODD, TWO, CUT, LAST = (
    (2, 3, 2, 5),
    (1, 9, 7, 9),
    (1, 40, 16, 3),
    (2, 35, 8, 3),
    (1, 44, 16, 3),
)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "k", "dtype"),
    [
        (SMALL, 7, jnp.bfloat16),
        pytest.param(TWO, 7, jnp.float32, marks=slow),
        pytest.param(SMALL, 7, jnp.float32, marks=slow),
        pytest.param(ODD, 3, jnp.float32, marks=slow),
        pytest.param(TWO, 7, jnp.bfloat16, marks=slow),
        pytest.param(CUT, 3, jnp.float32, marks=slow),
        pytest.param(LAST, 7, jnp.bfloat16, marks=slow),
    ],
)
def test_value_and_gradients_are_xlas(shape, k, dtype):
    x, kernel, g = arrays(shape, k, dtype)
    expected = value_and_gradients(x, kernel, g)
    got = (
        without_races(depthwise_pallas.forward, x, kernel),
        without_races(depthwise_pallas.forward, g, kernel[::-1, ::-1]),
        without_races(depthwise_pallas.kernel_gradient, x, g, k),
    )
    assert [a.dtype for a in got] == [dtype, dtype, jnp.float32]
    for a, b in zip(got, expected, strict=True):
        # Sums are float32 for both types; bfloat16 adds the one rounding of the result.
        rounding = 2**-8 * jnp.abs(b) if a.dtype == jnp.bfloat16 else 0
        error = jnp.abs(a.astype(jnp.float32) - b) - rounding
        assert float(error.max()) < 1e-5 * float(jnp.abs(b).max())


@pytest.mark.parametrize("k", [1, 3, 7, 11])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (16, 16), (17, 16), (40, 24), (28, 28)])
def test_the_shifted_bands_are_the_convolution(size, k):
    height, width = size
    cut = tiling(height, width, k)
    kernel = jax.random.normal(jax.random.key(0), (k, k, 1, 1))
    image = np.asarray(jax.random.normal(jax.random.key(1), (1, height, width, 1)))
    expected = depthwise_conv(image, kernel, implementation="xla")
    band = np.asarray(bands(kernel, width))[0]
    matrix = np.zeros((cut.outputs, cut.inputs), np.float32)
    for row, (start, stop, column) in enumerate(cut.spans):
        rows = slice(row * width, (row + 1) * width)
        matrix[rows, column : column + stop - start] = band[:, start:stop]
    below = cut.blocks * cut.pixels - height * width
    padded = np.pad(image.reshape(-1), (cut.lead, cut.lead + below))
    starts = range(0, height * width + below, cut.outputs)
    got = np.concatenate([matrix @ padded[start : start + cut.inputs] for start in starts])
    np.testing.assert_allclose(got[: height * width], expected.reshape(-1), atol=1e-5)


def test_taps_are_the_transpose_of_bands():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 2))
    band, transpose = jax.vjp(lambda kernel: bands(kernel, 4), kernel)
    weights = jax.random.normal(jax.random.key(1), band.shape)
    (expected,) = transpose(weights)
    diagonals = [np.kron(np.ones((1, 3)), np.eye(4, k=v - 1)) for v in range(3)]
    sums = jnp.stack([(weights * diagonal[None]).sum(1) for diagonal in diagonals], 1)
    np.testing.assert_allclose(taps(sums, 3), expected, rtol=1e-5)


@pytest.mark.parametrize("width", [11, 12])
def test_pieces_of_columns_make_up_the_convolution(width):
    cut = Columns(3, 4, Tiling(5, 8, 2, 5, 5, 0))
    x, kernel, g = arrays((2, 5, width, 3), 5, jnp.float32)
    y, by_x, by_kernel = value_and_gradients(x, kernel, g)

    def filtered(x, kernel):
        pieces = cut.with_neighbours(x)
        assert {piece.shape for piece in pieces} == {(2, 5, 8, 3)}
        results = [depthwise_conv(piece, kernel, implementation="xla") for piece in pieces]
        return cut.joined(results, width)

    np.testing.assert_allclose(filtered(x, kernel), y, atol=1e-5)
    np.testing.assert_allclose(filtered(g, kernel[::-1, ::-1]), by_x, atol=1e-5)
    parts = zip(cut.with_neighbours(x), cut.alone(g), strict=True)
    sums = sum(value_and_gradients(x, kernel, g)[2] for x, g in parts)
    np.testing.assert_allclose(sums, by_kernel, atol=1e-4)


@pytest.mark.parametrize("side", [7, 12, 14, 24, 28, 48, 56, 96])
def test_tilings_of_the_models_fit_a_core_of_a_v4(side):
    whole = columns(side, side, 7)
    assert (whole.pieces == 1) == (side < 96)
    assert whole.pieces * whole.own >= side
    cut = whole.tiling
    assert cut.width == whole.own + (6 if whole.pieces > 1 else 0)
    assert cut.vmem < VMEM_BYTES
    assert (cut.blocks - 1) * cut.step_rows < side <= cut.blocks * cut.step_rows
    assert cut.pixels % cut.outputs == 0


def test_what_is_not_supported():
    assert depthwise_pallas.is_supported((8, 56, 56, 96), 7, jnp.bfloat16)
    assert not depthwise_pallas.is_supported((8, 56, 56, 96), 7, jnp.float16)
    assert not depthwise_pallas.is_supported((8, 8, 4000, 96), 7, jnp.bfloat16)
    with pytest.raises(ValueError, match="4000 pixels wide and float32; use implementation='xla'"):
        depthwise_pallas.forward(jnp.ones((1, 8, 4000, 1)), jnp.ones((7, 7, 1, 1)))


WIDTHS = (96, 128, 192, 256)


@pytest.fixture
def compiler():
    pytest.importorskip("libtpu")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# T and S, B, L and XL, at 224 and 384 pixels: the stages' widths double as their sides halve.
@pytest.mark.nightly
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("channels", WIDTHS)
def test_compiles(channels, size, topology, compiler):
    sharding = SingleDeviceSharding(tpu_topology(topology).devices[0])

    def gradients(x, kernel, g):
        filtered = functools.partial(depthwise_conv, implementation="pallas")
        return jax.vjp(filtered, x, kernel)[1](g)

    for stage in range(4):
        side, width = size // 4 // 2**stage, channels * 2**stage
        shapes = ((LANES, side, side, width), (7, 7, 1, width), (LANES, side, side, width))
        operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
        text = compile_for_tpu(jax.jit(gradients), *operands).as_text()
        assert text.count("tpu_custom_call") >= 2
