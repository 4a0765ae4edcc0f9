"""PyTorch's storages and the tensors on them: their dtypes, and views that stay within bounds."""

import mmap
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from convnext_jax.convert.format_error import FormatError, quote

# torch's name of a dtype -> NumPy's dtype and the storage class that files until 2.0 name.
_TABLE: tuple[tuple[str, type, str | None], ...] = (
    ("float64", np.float64, "DoubleStorage"),
    ("float32", np.float32, "FloatStorage"),
    ("float16", np.float16, "HalfStorage"),
    ("bfloat16", ml_dtypes.bfloat16, "BFloat16Storage"),
    ("float8_e4m3fn", ml_dtypes.float8_e4m3fn, None),
    ("float8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz, None),
    ("float8_e5m2", ml_dtypes.float8_e5m2, None),
    ("float8_e5m2fnuz", ml_dtypes.float8_e5m2fnuz, None),
    ("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, None),
    ("int64", np.int64, "LongStorage"),
    ("int32", np.int32, "IntStorage"),
    ("int16", np.int16, "ShortStorage"),
    ("int8", np.int8, "CharStorage"),
    ("uint64", np.uint64, None),
    ("uint32", np.uint32, None),
    ("uint16", np.uint16, None),
    ("uint8", np.uint8, "ByteStorage"),
    ("bool", np.bool_, "BoolStorage"),
    ("complex64", np.complex64, "ComplexFloatStorage"),
    ("complex128", np.complex128, "ComplexDoubleStorage"),
)
DTYPES: dict[str, np.dtype] = {f"torch {name}": np.dtype(dtype) for name, dtype, _ in _TABLE}
STORAGE_DTYPES: dict[str, np.dtype] = {
    **{f"{module} {storage}": np.dtype(dtype)
       for _, dtype, storage in _TABLE if storage
       for module in ("torch", "torch.cuda")},
    "torch.storage UntypedStorage": np.dtype(np.uint8),
    "torch UntypedStorage": np.dtype(np.uint8),
}  # fmt: skip

# A size or a position beyond this is in no file, and no arithmetic on smaller ones gets slow.
_LARGEST = 2**48
_MOST_DIMENSIONS = 32


class Extent(NamedTuple):
    """Where a storage lies in the file, in bytes."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Storage:
    """A reference to a storage of `numel` elements, which follows elsewhere in the file.

    Attributes:
      view: (offset, length) in elements where this is a part of the storage `key`, as PyTorch
        until 0.4 wrote it.
    """

    key: str
    dtype: np.dtype
    numel: int
    view: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A strided view of a storage; nothing of it has been checked or read.

    Attributes:
      offset: of the first element, in elements.
      shape: as the file gives it.
      strides: in elements.
      dtype: the storage's own, but for an untyped storage.
    """

    storage: Storage
    offset: object
    shape: object
    strides: object
    dtype: np.dtype


def is_size(value: object) -> bool:
    """Whether a value of a file can be a count or a position."""
    return type(value) is int and 0 <= value <= _LARGEST


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, tuple | list) and len(value) <= _MOST_DIMENSIONS:
        return tuple(value) if all(map(is_size, value)) else None
    return None


def to_array(name: str, tensor: Tensor, data: mmap.mmap, extent: Extent) -> np.ndarray:
    """A tensor as a read-only view of the mapped file.

    Views of one storage are kept as views: tied weights share memory, a transpose stays strided. A
    tensor with more elements than its storage (an `expand`) is refused, since a file of a few
    bytes could claim any size so.

    Args:
      name: of the tensor, for messages.
      tensor: offset, shape and strides, untrusted.
      data: the file.
      extent: where the tensor's storage lies, known to be within the file.

    Returns:
      The array, of the file's dtype.

    Raises:
      FormatError: if the tensor does not lie within its storage.
    """
    called = f"tensor {quote(name)}"
    itemsize = tensor.dtype.itemsize
    start, num_bytes = extent
    if tensor.storage.view is not None:
        first, length = (n * tensor.storage.dtype.itemsize for n in tensor.storage.view)
        if first + length > num_bytes:
            raise FormatError(f"is damaged: {called} is on a view that reaches past its storage")
        start, num_bytes = start + first, length
    shape, strides = _sizes(tensor.shape), _sizes(tensor.strides)
    if shape is None or strides is None or len(shape) != len(strides) or not is_size(tensor.offset):
        raise FormatError(
            f"is damaged: {called} has a shape, a stride or an offset that is not a whole number "
            "from 0 on; download it again"
        )
    offset: int = tensor.offset  # type: ignore[assignment]
    extent_of_shape = 1
    for size in shape:
        # One after the other, since the product of thirty of them would be a large number.
        extent_of_shape = min(extent_of_shape * max(size, 1), _LARGEST + 1)
    if 0 in shape and extent_of_shape <= _LARGEST:
        array = np.zeros(shape, tensor.dtype)
        array.flags.writeable = False
        return array
    available = num_bytes // itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= available:
        raise FormatError(
            f"is damaged: {called} of shape {shape} reaches past its storage, to element {last} of "
            f"{available}; download it again, from a source that you trust"
        )
    if extent_of_shape > available:
        raise FormatError(
            f"is refused: {called} of shape {shape} repeats the {available} elements of its "
            "storage; save it with .contiguous()"
        )
    return np.ndarray(
        shape, tensor.dtype, data, start + offset * itemsize, [s * itemsize for s in strides]
    )
