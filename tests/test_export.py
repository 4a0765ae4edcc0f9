"""Exported networks: read again, run, and held against the network that they came from."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from tiny_pretrained import tiny_pretrained

from convnext_jax import cli, export
from convnext_jax.errors import UserError
from convnext_jax.exporting import checking, onnx_graph, stablehlo
from convnext_jax.exporting.interface import Interface, describe
from convnext_jax.exporting.onnx_graph import export_onnx
from convnext_jax.exporting.stablehlo import export_stablehlo
from convnext_jax.models import ConvNeXt, ModernizedResNet, SwinTransformer

SIZE = 32
ANY = ["--weights", "any"]
VARIANTS = {
    "v1": {"kernel_size": 7},
    "v2": {"use_grn": True, "layer_scale_init": None},
    "isotropic": {"isotropic": True, "depths": (2,), "dims": (8,), "patch_size": 8},
    "head": {"head_norm_first": True, "head_hidden": 9},
    "overlapping stem": {"patch_size": 5, "stem_stride": 2},
    "no head": {"num_classes": 0},
}


def random_images(batch, height=SIZE, width=None):
    shape = (batch, height, width or height, 3)
    return np.random.default_rng(batch).integers(0, 256, shape, np.uint8)


def expected(pretrained, images, method="__call__"):
    """The network's own answer to uint8 images, normalised by hand."""
    preprocessing = pretrained.preprocessing
    x = (images / 255 - preprocessing.mean) / preprocessing.std
    apply = jax.jit(lambda v, x: pretrained.model.apply(v, x, method=method))
    return np.asarray(apply(pretrained.variables, jnp.asarray(x, jnp.float32)))


def assert_close(found, wanted, tolerance):
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def reloaded(result):
    return jax_export.deserialize(bytearray(result.serialized))


# StableHLO.


@pytest.mark.parametrize(
    "variant", ["v2", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v != "v2")]
)
def test_stablehlo_of_each_variant(variant):
    pretrained = tiny_pretrained(**VARIANTS[variant])
    network = reloaded(export_stablehlo(pretrained, Interface(SIZE)))
    assert str(network.in_avals[0]) == f"uint8[batch,{SIZE},{SIZE},3]"
    images = random_images(2)
    # Normalised here in float64, and there in float32.
    assert_close(np.asarray(network.call(images)), expected(pretrained, images), 1e-5)


OTHERS = {
    "ResNet": ModernizedResNet(num_classes=5, depths=(1, 1), width=4),
    "Swin": SwinTransformer(
        num_classes=5, depths=(2, 1), width=4, num_heads=(1, 2), window_size=3, patch_size=2
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_stablehlo_of_the_networks_beside_convnext(family):
    pretrained = tiny_pretrained(model=OTHERS[family])
    result = export_stablehlo(pretrained, Interface(SIZE), weights_as_arguments=True)
    assert ("batch_stats/stem/norm/mean" in result.weights) == (family == "ResNet")
    images = random_images(2)
    output = np.asarray(reloaded(result).call(result.weights, images))
    assert_close(output, expected(pretrained, images), 1e-5)
    with pytest.raises(UserError, match=r"ONNX can be written of a ConvNeXt only"):
        export_onnx(pretrained, Interface(SIZE))


def test_a_swin_holds_one_size():
    with pytest.raises(UserError, match=r"--size any: the windows of a Swin"):
        export_stablehlo(tiny_pretrained(model=OTHERS["Swin"]), Interface(None))


def test_stablehlo_repeats_the_same_program():
    """Compiled from the file or from the module: the same to 1e-6, at every batch size."""
    pretrained = tiny_pretrained()
    network = reloaded(export_stablehlo(pretrained, Interface(SIZE, "float32")))
    apply = jax.jit(pretrained.model.apply)
    for batch in (1, 3):
        images = (random_images(batch) / np.float32(64) - 2).astype(np.float32)
        wanted = np.asarray(apply(pretrained.variables, images))
        assert_close(np.asarray(network.call(images)), wanted, 1e-6)


def test_stablehlo_of_any_size():
    pretrained = tiny_pretrained()
    network = reloaded(export_stablehlo(pretrained, Interface(None)))
    images = random_images(2, 13)
    assert_close(np.asarray(network.call(images)), expected(pretrained, images), 1e-5)
    with pytest.raises(ValueError, match="shapes"):
        network.call(random_images(1, 7))


def test_stablehlo_with_weights_as_arguments():
    pretrained = tiny_pretrained()
    result = export_stablehlo(pretrained, Interface(SIZE), weights_as_arguments=True)
    network, images = reloaded(result), random_images(2)
    assert "stages_1/blocks_0/dwconv/kernel" in result.weights
    assert all(isinstance(array, np.ndarray) for array in result.weights.values())
    output = np.asarray(network.call(result.weights, images))
    assert_close(output, expected(pretrained, images), 1e-5)
    # The weights are nowhere else: other ones give something else, and the file is small.
    other = {name: array * 2 for name, array in result.weights.items()}
    twice = dataclasses.replace(
        pretrained, variables=jax.tree.map(lambda x: x * 2, pretrained.variables)
    )
    assert_close(np.asarray(network.call(other, images)), expected(twice, images), 1e-5)
    baked = export_stablehlo(pretrained, Interface(SIZE))
    size = sum(array.nbytes for array in result.weights.values())
    assert baked.weights is None
    assert len(baked.serialized) - len(result.serialized) > 0.5 * size


def test_stablehlo_features():
    pretrained = tiny_pretrained()
    network = reloaded(export_stablehlo(pretrained, Interface(SIZE, features=True)))
    images = random_images(2)
    wanted = expected(pretrained, images, "pooled_features")
    assert wanted.shape == (2, 12)
    assert_close(np.asarray(network.call(images)), wanted, 1e-5)


@pytest.mark.slow
def test_stablehlo_in_bfloat16():
    single = tiny_pretrained()
    half = dataclasses.replace(single, model=single.model.clone(dtype=jnp.bfloat16))
    network = reloaded(export_stablehlo(half, Interface(SIZE)))
    images = random_images(2)
    output = np.asarray(network.call(images))
    assert "bf16" in str(network.mlir_module())
    assert_close(output, expected(single, images), 0.05)
    assert np.abs(output - expected(single, images)).max() > 0


def test_one_file_serves_every_platform():
    """The written-out depthwise convolution for the CPU, XLA's own for the others."""
    pretrained = tiny_pretrained()

    def program(*platforms):
        network = reloaded(export_stablehlo(pretrained, Interface(SIZE), platforms=platforms))
        assert network.platforms == platforms
        return str(network.mlir_module())

    depthwise = "feature_group_count = 8"
    assert depthwise in program("tpu")
    assert depthwise in program("cuda")
    assert depthwise not in program("cpu")
    every = program("cpu", "tpu", "cuda")
    assert depthwise in every
    assert every.count("stablehlo.case") > program("cpu").count("stablehlo.case") > 0


def test_what_stablehlo_refuses(monkeypatch):
    pretrained = tiny_pretrained()
    with pytest.raises(UserError, match=r"no platform 'gpu': use any of cpu, tpu, cuda, rocm"):
        export_stablehlo(pretrained, Interface(SIZE), platforms=["cpu", "gpu"])
    monkeypatch.setattr(stablehlo, "_LARGEST_FILE", 1000)
    with pytest.raises(UserError, match=r"can hold 2 GB: give --weights_as_arguments"):
        export_stablehlo(pretrained, Interface(SIZE))
    assert export_stablehlo(pretrained, Interface(SIZE), weights_as_arguments=True).weights


# The program.


@pytest.fixture(scope="module")
def network():
    return tiny_pretrained(class_names=tuple("abcdefg"))


@pytest.fixture
def use(monkeypatch):
    """Lets the program open this network, whatever --weights says."""

    def put(pretrained):
        def open_pretrained(source, *, sha256, dtype):
            return dataclasses.replace(pretrained, model=pretrained.model.clone(dtype=dtype))

        monkeypatch.setattr(export, "open_pretrained", open_pretrained)

    return put


def run(capsys, *argv):
    """Exit status, standard output, standard error."""
    status = cli.run(export.main, [str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_files(use, network, tmp_path, capsys):
    use(network)
    file = tmp_path / "new" / "tiny.stablehlo"
    status, out, err = run(capsys, *ANY, file)
    assert (status, err) == (0, "")
    assert {path.name for path in file.parent.iterdir()} == {
        "tiny.stablehlo",
        "tiny.stablehlo.json",
    }
    assert f"uint8 (batch, {SIZE}, {SIZE}, 3)  RGB, 0 to 255" in out
    assert "checked on 2 random images: the logits, of at most " in out
    assert "network.call(images)" in out

    description = json.loads((tmp_path / "new" / "tiny.stablehlo.json").read_text())
    assert description["format"] == "stablehlo"
    assert description["platforms"] == ["cpu", "tpu", "cuda"]
    assert description["input"]["shape"] == ["batch", SIZE, SIZE, 3]
    assert description["input"]["dtype"] == "uint8"
    assert description["output"] == {"name": "logits", "shape": ["batch", 7], "dtype": "float32"}
    assert description["preprocessing"] == {
        "image_size": SIZE,
        "resize_size": 40,
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.3],
        "std": [0.2, 0.3, 0.25],
        "note": "",
    }
    assert description["class_names"] == list("abcdefg")
    assert description["weights"] == {"source": "weights.pth", "sha256": "0" * 64}
    assert description["jax"] == jax.__version__
    loaded = jax_export.deserialize(bytearray(file.read_bytes()))
    assert description["calling_convention_version"] == loaded.calling_convention_version


def test_a_process_that_knows_only_jax(use, network, tmp_path, capsys):
    use(network)
    file = tmp_path / "tiny.stablehlo"
    run(capsys, *ANY, file, "--weights_as_arguments", "--no_check")
    images = random_images(3)
    np.save(tmp_path / "images.npy", images)
    program = """
        import json, sys
        import numpy
        from jax import export

        directory = sys.argv[1]
        description = json.load(open(f"{directory}/tiny.stablehlo.json"))
        with open(f"{directory}/{description['file']}", "rb") as file:
            network = export.deserialize(bytearray(file.read()))
        weights = dict(numpy.load(f"{directory}/{description['weights_as_first_argument']}"))
        logits = network.call(weights, numpy.load(f"{directory}/images.npy"))
        numpy.save(f"{directory}/logits.npy", logits)
        assert not {"flax", "convnext_jax", "orbax"} & set(sys.modules)
    """
    command = [sys.executable, "-I", "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "logits.npy"), expected(network, images), 1e-5)


def test_nothing_is_overwritten(use, network, tmp_path, capsys):
    use(network)
    file = tmp_path / "tiny.stablehlo"
    arguments = [*ANY, "--no_check", file]
    for name in ("tiny.stablehlo", "tiny.stablehlo.json", "tiny.stablehlo.npz"):
        (tmp_path / name).write_text("mine")
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert err == (
            f"error: {tmp_path / name} exists; give --overwrite to replace it, or another name\n"
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    # What is no part of the new files does not stay beside them.
    (tmp_path / "tiny.stablehlo.npz").write_text("old weights")
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.stablehlo", "tiny.stablehlo.json"}


def test_a_file_that_gives_something_else_is_not_kept(use, network, tmp_path, capsys, monkeypatch):
    use(network)
    # As if what was written had lost its weights' signs.
    honest = checking.forward

    def other(pretrained, *arguments):
        function = honest(pretrained, *arguments)
        return lambda variables, images: -function(variables, images)

    monkeypatch.setattr(checking, "forward", other)
    (tmp_path / "tiny.json").write_text("{}")
    status, out, err = run(capsys, *ANY, tmp_path / "tiny")
    assert (status, out) == (2, "")
    (tmp_path / "tiny.json").unlink()
    status, out, err = run(capsys, *ANY, tmp_path / "tiny")
    assert (status, out) == (1, "")
    assert err.startswith("stopped: the logits of the written file differ by ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_elsewhere_is_not_checked(use, network, tmp_path, capsys):
    use(network)
    status, out, _ = run(capsys, *ANY, "--platforms", "tpu,cuda", tmp_path / "tiny")
    assert status == 0
    assert "not checked: this machine is none of tpu, cuda" in out


@pytest.mark.slow
def test_options(use, network, tmp_path, capsys):
    use(network)
    file = tmp_path / "tiny"
    arguments = ["--size", "any", "--input", "float32", "--features", "--dtype", "bfloat16"]
    status, out, _ = run(capsys, *ANY, file, *arguments)
    assert status == 0
    assert "checked on 2 random images: the features" in out
    description = json.loads((tmp_path / "tiny.json").read_text())
    assert description["dtype"] == "bfloat16"
    assert description["input"]["shape"] == ["batch", "height", "width", 3]
    assert description["input"]["smallest_size"] == 8
    assert "(x / 255 - mean) / std" in description["input"]["values"]
    assert description["output"]["shape"] == ["batch", 12]
    assert description["class_names"] == []
    images = (random_images(1, 48) / np.float32(64) - 2).astype(np.float32)
    loaded = jax_export.deserialize(bytearray(file.read_bytes()))
    assert loaded.call(images).shape == (1, 12)
    assert loaded.call(images[:, :33, :17]).shape == (1, 12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--size", "large"], "--size is 'large'; it must be a number of pixels, or \"any\""),
        (["--size", "4"], "images of 4 pixels are too small"),
        (["--platforms", "cpu,abacus"], "there is no platform 'abacus'"),
        (["--format", "onnx", "--dtype", "bfloat16"], "--weights_as_arguments and --dtype"),
    ],
)
def test_mistakes(use, network, tmp_path, capsys, arguments, sentence):
    use(network)
    status, out, err = run(capsys, *ANY, tmp_path / "tiny", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_file(use, network, tmp_path, capsys):
    use(network)
    assert "is a directory; give the file to write" in run(capsys, *ANY, tmp_path)[2]


def test_without_onnx(use, network, tmp_path, capsys, monkeypatch):
    use(network)
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = run(capsys, *ANY, "--format", "onnx", tmp_path / "tiny.onnx")
    assert status == 2
    assert "pip install 'convnext-jax[onnx]'" in err
    assert list(tmp_path.iterdir()) == []


def test_description_of_a_headless_network():
    pretrained = tiny_pretrained(num_classes=0)
    description = describe(pretrained, Interface(SIZE, features=True))
    assert description["output"] == {"name": "features", "shape": ["batch", 12], "dtype": "float32"}


# ONNX.


def test_the_onnx_graph_knows_every_argument_of_the_network():
    """A new argument of ConvNeXt must be thought of in `onnx_graph`, which writes it anew."""
    in_graph = {"depths", "dims", "isotropic", "patch_size", "stem_stride", "kernel_size"}
    in_graph |= {"use_grn", "layer_scale_init", "head_norm_first", "head_hidden", "norm_eps"}
    in_graph |= {"num_classes"}
    of_training = {"drop_path_rate", "head_init_scale", "remat", "scan_blocks"}
    of_numbers = {"dtype", "param_dtype", "precision", "depthwise", "mlp"}
    of_feature_maps = {"feature_norms"}
    of_flax = {"parent", "name"}
    arguments = {field.name for field in dataclasses.fields(ConvNeXt)}
    assert arguments == in_graph | of_training | of_numbers | of_feature_maps | of_flax


def run_onnx(model, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        model if isinstance(model, str) else model.SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    (output,) = session.run(None, {"images": images})
    return output


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx_of_each_variant(variant):
    onnx = pytest.importorskip("onnx")
    pretrained = tiny_pretrained(**VARIANTS[variant])
    fixed = onnx_graph.export_onnx(pretrained, Interface(SIZE))
    free = onnx_graph.export_onnx(pretrained, Interface(None))
    for model, shapes in ((fixed, [(1, SIZE), (3, SIZE)]), (free, [(2, 33, 65), (1, 40, 9)])):
        onnx.checker.check_model(model, full_check=True)
        for shape in shapes:
            images = random_images(*shape)
            assert_close(run_onnx(model, images), expected(pretrained, images), 1e-5)
    names = {tensor.name for tensor in fixed.graph.initializer}
    assert "stages_0/blocks_0/dwconv/kernel" in names
    operators = [node.op_type for node in fixed.graph.node]
    depth = sum(pretrained.model.depths)
    assert operators.count("Gelu") == depth + bool(pretrained.model.head_hidden)
    assert operators.count("LayerNormalization") >= depth + 1


@pytest.mark.parity
def test_onnx_of_floats_and_features():
    pytest.importorskip("onnx")
    pretrained = tiny_pretrained()
    images = random_images(2)
    mean, std = pretrained.preprocessing.mean, pretrained.preprocessing.std
    normalised = ((images / 255 - mean) / std).astype(np.float32)
    model = onnx_graph.export_onnx(pretrained, Interface(SIZE, "float32", features=True))
    assert [output.name for output in model.graph.output] == ["features"]
    wanted = expected(pretrained, images, "pooled_features")
    assert_close(run_onnx(model, normalised), wanted, 1e-5)


@pytest.mark.parity
def test_onnx_by_the_program(use, network, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnx")
    use(network)
    file = tmp_path / "tiny.onnx"
    status, out, _ = run(capsys, *ANY, "--format", "onnx", file)
    assert status == 0
    assert "checked on 2 random images" in out
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.onnx", "tiny.onnx.json"}
    assert json.loads((tmp_path / "tiny.onnx.json").read_text())["opset"] == 20
    images = random_images(3)
    assert_close(run_onnx(str(file), images), expected(network, images), 1e-5)

    # Beyond protobuf's limit the weights lie beside it.
    monkeypatch.setattr(export, "_LARGEST_ONNX", 1000)
    assert run(capsys, *ANY, "--format", "onnx", file, "--overwrite")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "tiny.onnx",
        "tiny.onnx.json",
        "tiny.onnx.data",
    }
    assert_close(run_onnx(str(file), images), expected(network, images), 1e-5)
