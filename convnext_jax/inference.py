"""From image files to what a network says of them, in batches of one compiled shape."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax import compiler_options
from convnext_jax.convert.pretrained import Pretrained
from convnext_jax.data.augment import normalize
from convnext_jax.data.imagenet_classes import imagenet_class_names
from convnext_jax.data.photographs import central_part, open_photograph
from convnext_jax.data.transforms import UndecodableImageError
from convnext_jax.errors import UserError

PyTree = Any
Output = Literal["logits", "features"]
Pixels = Literal["uint8", "float32"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that go through the network together.

    Attributes:
      paths: of the n images.
      images: (B, S, S, 3) uint8; rows from n on are padding, so that all batches have one shape.
    """

    paths: list[Path]
    images: np.ndarray


def batches(
    paths: Sequence[Path],
    load: Callable[[Path], np.ndarray],
    batch_size: int,
    on_error: Callable[[Path, str], None],
) -> Iterator[Batch]:
    """Loads images on all cores, ahead of their use, and puts them together in order.

    Args:
      paths: of the images.
      load: opens and transforms one, to (S, S, 3) uint8.
      batch_size: B.
      on_error: is told of an image that can't be decoded, and why; the others close ranks.
    """
    row: list[tuple[Path, np.ndarray]] = []
    for path, image in _loaded(paths, load, ahead=2 * batch_size):
        try:
            row.append((path, image.result()))
        except UndecodableImageError as error:
            on_error(path, str(error))
        if len(row) == batch_size:
            yield _stack(row, batch_size)
            row.clear()
    if row:
        yield _stack(row, batch_size)


def _loaded(
    paths: Sequence[Path], load: Callable[[Path], np.ndarray], ahead: int
) -> Iterator[tuple[Path, Future[np.ndarray]]]:
    # Not `Executor.map`, which would hold every image of a large folder in memory.
    waiting: collections.deque[tuple[Path, Future[np.ndarray]]] = collections.deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in paths:
            waiting.append((path, pool.submit(load, path)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting


def _stack(row: list[tuple[Path, np.ndarray]], batch_size: int) -> Batch:
    images = np.stack([image for _, image in row])
    padding = ((0, batch_size - len(row)), (0, 0), (0, 0), (0, 0))
    return Batch([path for path, _ in row], np.pad(images, padding))


def load_image(path: Path, pretrained: Pretrained) -> np.ndarray:
    """Opens an image file and prepares it for the network: (S, S, 3) uint8.

    Raises:
      UndecodableImageError: see `open_photograph`.
    """
    image = open_photograph(path)
    if pretrained.preprocessing.resize_size is not None:
        image = central_part(image)
    return pretrained.preprocessing.transform().apply(image)


def at_size(pretrained: Pretrained, image_size: int) -> Pretrained:
    """The same network for images of another size, of which the crop keeps its share.

    Raises:
      UserError: if the size is smaller than the network's stride.
    """
    stride = pretrained.model.strides[-1]
    if image_size < stride:
        raise UserError(
            f"images of {image_size} pixels are too small for this network, whose stride is "
            f"{stride}; give --size {stride} or more"
        )
    preprocessing = pretrained.preprocessing.at_size(image_size)
    return dataclasses.replace(pretrained, preprocessing=preprocessing)


def class_names(pretrained: Pretrained) -> tuple[str, ...] | None:
    """One name per class: those kept with the weights, ImageNet's where there are a thousand."""
    if pretrained.class_names is None and pretrained.model.num_classes == 1000:
        return imagenet_class_names()
    return pretrained.class_names


def forward(
    pretrained: Pretrained, output: Output, pixels: Pixels = "uint8"
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """The network from pixels on.

    Args:
      pretrained: the network.
      output: "logits", or "features" for what the head reads.
      pixels: "uint8" for images as decoded, which are then normalised as the weights want it;
        "float32" for such as are normalised already.

    Returns:
      A function of variables and images (B, H, W, C_in), giving float32 (B, num_classes or
      dims[-1]).
    """
    model, preprocessing = pretrained.model, pretrained.preprocessing
    method = "pooled_features" if output == "features" else "__call__"

    def apply(variables: PyTree, images: jax.Array) -> jax.Array:
        if pixels == "uint8":
            dtype = jnp.dtype(model.dtype)
            images = normalize(images, preprocessing.mean, preprocessing.std, dtype)
        result = model.apply(variables, images, method=method)
        assert isinstance(result, jax.Array)
        return result

    return apply


def predict(
    pretrained: Pretrained,
    batches: Iterator[Batch],
    top: int,
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yields each image's likeliest classes, the likeliest first.

    Args:
      pretrained: the model, with a head.
      batches: the images, all batches of one shape.
      top: how many classes.

    Yields:
      The path, and for each class "class" (its number), "name" and "probability" (softmax).

    Raises:
      UserError: if the network gives something that is not finite.
    """
    names = class_names(pretrained) or [f"class {i}" for i in range(pretrained.model.num_classes)]

    logits = forward(pretrained, "logits")

    @functools.partial(jax.jit, compiler_options=compiler_options.for_network())
    def likeliest(variables: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits(variables, images)), top)
        return probabilities, classes

    for batch in batches:
        probabilities, classes = jax.device_get(
            likeliest(pretrained.variables, jnp.asarray(batch.images))
        )
        _check_finite(probabilities, batch, pretrained)
        for path, p, c in zip(batch.paths, probabilities, classes, strict=False):
            yield (
                path,
                [
                    {"class": int(i), "name": names[i], "probability": float(x)}
                    for i, x in zip(c, p, strict=True)
                ],
            )


def embed(pretrained: Pretrained, batches: Iterator[Batch]) -> tuple[list[Path], np.ndarray]:
    """Gives the pooled and normalised features that the head reads.

    Returns:
      The N paths, and float32 (N, C).

    Raises:
      UserError: if the network gives something that is not finite.
    """
    compiled = jax.jit(
        forward(pretrained, "features"), compiler_options=compiler_options.for_network()
    )
    paths: list[Path] = []
    rows = [np.zeros((0, pretrained.model.dims[-1]), np.float32)]
    for batch in batches:
        features = jax.device_get(compiled(pretrained.variables, jnp.asarray(batch.images)))
        _check_finite(features, batch, pretrained)
        paths += batch.paths
        rows.append(features[: len(batch.paths)])
    return paths, np.concatenate(rows)


def _check_finite(output: np.ndarray, batch: Batch, pretrained: Pretrained) -> None:
    rows = len(batch.paths)
    bad = np.flatnonzero(~np.isfinite(output[:rows]).all(axis=1))
    if bad.size:
        raise UserError(
            f"the network gives values that are not finite for {batch.paths[bad[0]]}: the "
            f"weights of {pretrained.source} are damaged, or those of a run that diverged"
        )
