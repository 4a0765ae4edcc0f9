"""A network as ONNX, written node by node with the `onnx` package.

Why not by a converter: `jax2onnx` 0.17 does convert this network, and rightly, but it demands
orbax-checkpoint < 0.11.37, older than what this library stands on, so the two can't be installed
together. And from traced JAX it makes 983 nodes of a convnext_tiny, the layer norms taken apart, in
ten times the time. The network is short: in ONNX's own LayerNormalization, Gelu and Conv it is
218 nodes, of any batch, height and width, whose weights keep their names. onnxruntime runs both at
the same pace.

SavedModel is not offered: jax2tf needs TensorFlow, and so does orbax-export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.errors import UserError
from convnext_jax.exporting.interface import Interface
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.layers import GlobalResponseNorm
from convnext_jax.version import __version__

# The first with Gelu (onnxruntime reads it from 1.17 on), and the format that goes with it.
OPSET = 20
_IR_VERSION = 9


def export_onnx(pretrained: Pretrained, interface: Interface) -> Any:
    """Writes the network as an ONNX graph, in float32 whatever the model's `dtype`.

    Args:
      pretrained: the network.
      interface: what goes in and comes out. Where it leaves the size open, any height and width
        from the model's stride on are taken.

    Returns:
      An `onnx.ModelProto` with the input "images", the output "logits" or "features", and the
      weights under their Flax names, "stages_2/blocks_5/dwconv/kernel".

    Raises:
      UserError: if the network is no ConvNeXt, or `onnx` is not installed.
    """
    if not isinstance(pretrained.model, ConvNeXt):
        raise UserError(
            f"ONNX can be written of a ConvNeXt only, and {pretrained.model_name or 'this network'}"
            " is none; give --format stablehlo"
        )
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "writing ONNX needs the onnx package: pip install 'convnext-jax[onnx]'"
        ) from error
    graph = _Graph(onnx, jax.device_get(pretrained.variables["params"]))
    output = _network(graph, pretrained, interface)
    graph.rename(output, interface.output)

    model = pretrained.model
    has_classes = not interface.features and model.num_classes > 0
    side: tuple[Any, Any] = (
        (interface.image_size,) * 2 if interface.image_size else ("height", "width")
    )
    make = onnx.helper.make_tensor_value_info
    pixels = onnx.TensorProto.UINT8 if interface.pixels == "uint8" else onnx.TensorProto.FLOAT
    width = model.num_classes if has_classes else model.dims[-1]
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            pretrained.model_name or "convnext",
            [make("images", pixels, ["batch", *side, 3])],
            [make(interface.output, onnx.TensorProto.FLOAT, ["batch", width])],
            graph.initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="convnext_jax",
        producer_version=__version__,
    )


def _network(graph: _Graph, pretrained: Pretrained, interface: Interface) -> str:
    model, preprocessing = pretrained.model, pretrained.preprocessing
    x = "images"
    if interface.pixels == "uint8":
        x = graph.node("Cast", x, to=1)
        std = np.asarray(preprocessing.std, np.float32)
        x = graph.node("Mul", x, graph.constant("pixel_scale", 1 / (255 * std)))
        offset = np.asarray(preprocessing.mean, np.float32) / std
        x = graph.node("Sub", x, graph.constant("pixel_offset", offset))

    overlap = model.stem_kernel_size - model.strides[0]
    x = _conv(graph, x, "stem/conv", stride=model.strides[0], padding=_split(overlap))
    if not model.isotropic:
        x = _layer_norm(graph, x, "stem/norm", model.norm_eps)
    for i, depth in enumerate(model.depths):
        if i:
            x = _layer_norm(graph, x, f"stages_{i}/downsample/norm", model.norm_eps)
            x = _conv(graph, x, f"stages_{i}/downsample/conv", stride=2)
        for j in range(depth):
            x = _block(graph, x, f"stages_{i}/blocks_{j}", model.norm_eps)

    height_and_width = graph.constant("height_and_width", np.array([1, 2]))
    pool = {"keepdims": 0}
    if model.head_norm_first:
        x = _layer_norm(graph, x, "norm", model.norm_eps)
        x = graph.node("ReduceMean", x, height_and_width, **pool)
    else:
        x = graph.node("ReduceMean", x, height_and_width, **pool)
        x = _layer_norm(graph, x, "norm", model.norm_eps)
    if interface.features or not model.num_classes:
        return x
    if model.head_hidden:
        x = graph.node("Gelu", _dense(graph, x, "pre_logits"), approximate="none")
    return _dense(graph, x, "head")


def _block(graph: _Graph, x: str, path: str, norm_eps: float) -> str:
    """See `models.blocks.Block`; x is (B, H, W, C)."""
    kernel = graph.shape(f"{path}/dwconv/kernel")
    y = _conv(graph, x, f"{path}/dwconv", padding=(kernel[0] // 2,) * 2, groups=kernel[-1])
    y = _layer_norm(graph, y, f"{path}/norm", norm_eps)
    y = graph.node("Gelu", _dense(graph, y, f"{path}/pwconv1"), approximate="none")
    if graph.has(f"{path}/grn/gamma"):
        y = _global_response_norm(graph, y, f"{path}/grn")
    y = _dense(graph, y, f"{path}/pwconv2")
    if graph.has(f"{path}/gamma"):
        y = graph.node("Mul", y, graph.weight(f"{path}/gamma"))
    return graph.node("Add", x, y)


def _global_response_norm(graph: _Graph, x: str, path: str) -> str:
    """See `models.layers.GlobalResponseNorm`."""
    axes = graph.constant("height_and_width", np.array([1, 2]))
    norm = graph.node("ReduceL2", x, axes)
    mean = graph.node("ReduceMean", norm, graph.constant("channels", np.array([3])))
    epsilon = graph.constant("grn_epsilon", np.float32(GlobalResponseNorm.epsilon))
    response = graph.node("Div", norm, graph.node("Add", mean, epsilon))
    scale = graph.node("Mul", response, graph.weight(f"{path}/gamma"))
    scaled = graph.node("Mul", x, graph.node("Add", scale, graph.constant("one", np.float32(1))))
    return graph.node("Add", scaled, graph.weight(f"{path}/beta"))


def _layer_norm(graph: _Graph, x: str, path: str, epsilon: float) -> str:
    scale, bias = graph.weight(f"{path}/scale"), graph.weight(f"{path}/bias")
    return graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def _dense(graph: _Graph, x: str, path: str) -> str:
    product = graph.node("MatMul", x, graph.weight(f"{path}/kernel"))
    return graph.node("Add", product, graph.weight(f"{path}/bias"))


def _conv(
    graph: _Graph,
    x: str,
    path: str,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
) -> str:
    """A convolution of (B, H, W, C); ONNX itself knows only (B, C, H, W)."""
    before, after = padding
    kernel = graph.weight(f"{path}/kernel", axes=(3, 2, 0, 1))
    y = graph.node(
        "Conv",
        graph.node("Transpose", x, perm=[0, 3, 1, 2]),
        kernel,
        graph.weight(f"{path}/bias"),
        strides=[stride, stride],
        pads=[before, before, after, after],
        group=groups,
    )
    return graph.node("Transpose", y, perm=[0, 2, 3, 1])


def _split(overlap: int) -> tuple[int, int]:
    return overlap // 2, overlap - overlap // 2


class _Graph:
    """Nodes and initializers as they come."""

    def __init__(self, onnx: Any, params: Mapping[str, Any]):
        self._onnx = onnx
        self._params = traverse_util.flatten_dict(params, sep="/")
        self._known: set[str] = set()
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output, and gives the output's name."""
        output = f"{operator}_{len(self.nodes)}"
        make = self._onnx.helper.make_node
        self.nodes.append(make(operator, list(inputs), [output], name=output, **attributes))
        return output

    def has(self, path: str) -> bool:
        """Whether the network has such a parameter."""
        return path in self._params

    def shape(self, path: str) -> tuple[int, ...]:
        """Of a parameter, as Flax holds it."""
        return tuple(self._params[path].shape)

    def weight(self, path: str, axes: Sequence[int] | None = None) -> str:
        """Adds a parameter, its axes permuted if asked for, and gives its name."""
        array = np.asarray(self._params[path], np.float32)
        return self.constant(path, array if axes is None else array.transpose(axes))

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Adds an array once under its name, which it gives back."""
        if name not in self._known:
            self._known.add(name)
            array = np.ascontiguousarray(value).reshape(np.shape(value))
            self.initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def rename(self, output: str, name: str) -> None:
        """Gives the last node's output the name that the graph shows outside."""
        last = self.nodes[-1]
        assert list(last.output) == [output]
        last.output[0] = name
