"""One process's rows of a batch, made from the batch's number: by `loader`, in worker processes."""

from __future__ import annotations

from typing import Literal, Protocol

import grain
import numpy as np

from convnext_jax.data.decoding import UndecodableImageError
from convnext_jax.data.order import shuffled
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError

BadImagePolicy = Literal["skip", "stop"]
Batch = dict[str, np.ndarray]

# So many undecodable images in a row are no accident: the wrong files, or a dead disk.
_MAX_SUCCESSIVE_BAD_IMAGES = 100


class RandomTransform(Protocol):
    """Turns an encoded image into several (image_size, image_size, 3) uint8, at random."""

    @property
    def image_size(self) -> int: ...  # noqa: D102

    def views(  # noqa: D102
        self, encoded: bytes, rng: np.random.Generator, count: int
    ) -> list[np.ndarray]: ...


class FixedTransform(Protocol):
    """Turns an encoded image into (image_size, image_size, 3) uint8."""

    @property
    def image_size(self) -> int: ...  # noqa: D102

    def __call__(self, encoded: bytes) -> np.ndarray: ...  # noqa: D102


class _ImageBuffer:
    """Holds the images of a batch, and is filled row by row.

    An image that is written where it is to stay costs one copy out of the processor's cache. Images
    kept apart and stacked at the end, as Grain's own batching does, cost a quarter of the fast
    decoder's time.
    """

    def __init__(self, rows: int, image_size: int, in_shared_memory: bool):
        shape = (rows, image_size, image_size, 3)
        self.images: np.ndarray
        if in_shared_memory:
            self.images = grain.multiprocessing.SharedMemoryArray(shape, np.uint8)
        else:
            self.images = np.empty(shape, np.uint8)

    def __enter__(self) -> np.ndarray:
        return self.images

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error is not None and isinstance(self.images, grain.multiprocessing.SharedMemoryArray):
            # What is not handed over nobody else removes.
            self.images.unlink_on_del()


class TrainBatch:
    """Makes a block of training rows from the block's number.

    Attributes:
      in_shared_memory: whether the images are written where other processes can read them.
      image_bytes: what a block's images weigh.
    """

    def __init__(
        self,
        source: Source,
        transform: RandomTransform,
        rows: int,
        images_per_step: int,
        repeats: int,
        seed: int,
        on_bad_image: BadImagePolicy,
    ):
        """Makes no batch yet.

        Args:
          source: the data set.
          transform: decodes and augments one image.
          rows: of a block: one process's part of a batch.
          images_per_step: different images in a global batch.
          repeats: rows that show one image.
          seed: of order and augmentation.
          on_bad_image: `"skip"` or `"stop"`.
        """
        self._source = source
        self._transform = transform
        self._rows = rows
        self._images_per_pass = len(source) // images_per_step * images_per_step
        self._repeats = repeats
        self._order_seed, image_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
        self._generators = grain.experimental.RngPool(image_seed)
        self._on_bad_image = on_bad_image
        self.in_shared_memory = False
        self.image_bytes = rows * transform.image_size**2 * 3

    def __call__(self, block: int) -> Batch:
        """What `train_loader` says of a batch, for this process's rows."""
        labels = np.empty(self._rows, np.int32)
        indices, bad_indices = np.empty((2, self._rows), np.int64)
        buffer = _ImageBuffer(self._rows, self._transform.image_size, self.in_shared_memory)
        count = self._rows // self._repeats
        # A pass holds whole global batches, so a block lies within one.
        which_pass, begin = divmod(block * count, self._images_per_pass)
        order = shuffled(
            np.arange(begin, begin + count), len(self._source), (self._order_seed, which_pass)
        )
        with buffer as images:
            for i in range(count):
                first = i * self._repeats
                same_image = slice(first, first + self._repeats)
                views, labels[same_image], indices[same_image], bad_indices[same_image] = (
                    self._views(block * count + i, int(order[i]))
                )
                for row, view in enumerate(views, first):
                    images[row] = view
        return {"image": images, "label": labels, "index": indices, "bad_index": bad_indices}

    def _views(self, position: int, index: int) -> tuple[list[np.ndarray], int, int, int]:
        """Views of a record, their label, the record that they show and one that they replace."""
        bad_index = -1
        rng = self._generators.acquire_rng(position)
        for offset in range(min(len(self._source), _MAX_SUCCESSIVE_BAD_IMAGES)):
            shown = (index + offset) % len(self._source)
            record = self._source[shown]
            try:
                views = self._transform.views(record.image, rng, self._repeats)
            except UndecodableImageError as error:
                if self._on_bad_image == "stop":
                    raise _bad_image(self._source, shown, error) from error
                bad_index = index
                continue
            self._generators.release_rng(rng)
            return views, record.label, shown, bad_index
        raise UserError(
            f"From {self._source.describe(index)} on {offset + 1} images in a row cannot be "
            "decoded: check the data set."
        )


class EvalBatch:
    """Makes a block of evaluation rows, of which the last may be padding, from its number.

    Attributes:
      in_shared_memory: whether the images are written where other processes can read them.
      image_bytes: what a block's images weigh.
    """

    def __init__(
        self,
        source: Source,
        transform: FixedTransform,
        rows: int,
        on_bad_image: BadImagePolicy,
    ):
        """Makes no batch yet.

        Args:
          source: the data set.
          transform: decodes one image.
          rows: of a block: one process's part of a batch.
          on_bad_image: `"skip"` or `"stop"`.
        """
        self._source = source
        self._transform = transform
        self._rows = rows
        self._on_bad_image = on_bad_image
        self.in_shared_memory = False
        self.image_bytes = rows * transform.image_size**2 * 3

    def __call__(self, block: int) -> Batch:
        """What `eval_loader` says of a batch, for this process's rows."""
        labels = np.zeros(self._rows, np.int32)
        indices = np.full(self._rows, -1, np.int64)
        mask = np.zeros(self._rows, np.float32)
        buffer = _ImageBuffer(self._rows, self._transform.image_size, self.in_shared_memory)
        with buffer as images:
            for row, position in enumerate(range(block * self._rows, (block + 1) * self._rows)):
                if position >= len(self._source):
                    images[row] = 0
                    continue
                indices[row] = position
                record = self._source[position]
                try:
                    images[row] = self._transform(record.image)
                except UndecodableImageError as error:
                    if self._on_bad_image == "stop":
                        raise _bad_image(self._source, position, error) from error
                    images[row] = 0
                    continue
                labels[row], mask[row] = record.label, 1
        return {"image": images, "label": labels, "index": indices, "mask": mask}


def _bad_image(source: Source, index: int, error: UndecodableImageError) -> UserError:
    return UserError(
        f"Cannot decode {source.describe(index)} ({error}): repair or remove it, or set "
        "on_bad_image to 'skip'."
    )
