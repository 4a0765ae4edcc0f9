"""A .safetensors file as memory-mapped arrays.

The library checks the file: that the header is sound and that the tensors cover the data without a
gap or an overlap. It copies what it loads, so the header's positions are used to map instead.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.mapped import map_file

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; the library might keep the first.
    names = dict(pairs)
    if len(names) != len(pairs):
        raise FormatError("is damaged: its header names something twice")
    return names


def open_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Maps a .safetensors file; reads its header, and of its tensors nothing.

    Args:
      path: of the file.

    Returns:
      (name -> read-only view of the file, bfloat16 as `ml_dtypes.bfloat16`; the text that the file
      holds under `__metadata__`).

    Raises:
      FormatError: if the library finds it unsound, or a dtype is not one of NumPy's or ml_dtypes'.
    """
    try:
        with safe_open(path, framework="np") as checked:
            metadata = dict(checked.metadata() or {})
    except SafetensorError as error:
        raise FormatError(
            f"is truncated or damaged: safetensors says {quote(str(error), 120)}; download it again"
        ) from error
    data = map_file(path)
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError("is damaged: its header is no JSON; download it again") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise FormatError(
                f"holds tensor {quote(name)} of type {quote(entry['dtype'])}, which is not read; "
                "save it as float32, float16 or bfloat16"
            )
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        start = 8 + length + begin
        if start + (end - begin) > len(data) or len(shape) > 32:
            raise FormatError(f"is damaged: tensor {quote(name)} reaches out of the file")
        if 0 in shape:
            array = np.zeros(shape, dtype)
            array.flags.writeable = False
        else:
            array = np.ndarray(shape, dtype, data, start)
        tensors[name] = array
    return tensors, metadata
