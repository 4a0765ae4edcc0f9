"""The names that a PyTorch file's pickle may mention, and what stands for each.

Nothing of what is named is imported: weights become `Storage` and `Tensor`, containers become dicts
and lists, and what options and optimizers bring along becomes `Inert`. Any other name is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.torch_tensors import DTYPES, STORAGE_DTYPES, Storage, Tensor

# The functions that rebuild tensors take up to eight. A long argument, which the memo can repeat at
# two bytes a time, would be copied at each call.
_MOST_ARGUMENTS = 16

INSTEAD = (
    "save the state dict alone, with torch.save(model.state_dict(), path) or as .safetensors, "
    "in a program that trusts the file"
)


@dataclass(frozen=True, slots=True)
class Inert:
    """Stands for an object that belongs in a training file but is no weight; it holds nothing."""

    name: str


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names, as "module name"; never imported."""

    name: str


# What options and optimizers bring along: no weights, so nothing of them is kept.
_INERT = frozenset(
    f"{module} {name}"
    for modules, names in (
        (("argparse",), ("Namespace",)),
        (("builtins", "__builtin__"), ("set", "frozenset", "complex", "slice", "range", "bytearray",
                                       "object")),
        (("collections",), ("Counter", "deque")),
        (("datetime",), ("datetime", "date", "timedelta")),
        (("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath", "PurePosixPath", "Path")),
        (("_codecs",), ("encode",)),
        (("numpy",), ("dtype", "ndarray", "float64", "float32", "int64", "int32", "bool_")),
        (("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar", "_reconstruct")),
        (("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
        (("torch",), ("Size", "device", "Generator", "Tensor", "memory_format")),
        (("torch.serialization",), ("_get_layout",)),
        (("torch.nn.parameter",), ("Parameter", "Buffer")),
    )
    for module in modules
    for name in names
)  # fmt: skip


def _ordered_dict(pairs: Any = ()) -> dict[str, Any]:
    # Pairs as arguments are Python 2's way; later ones follow as items.
    if not isinstance(pairs, list | tuple):
        raise TypeError
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[0]) is str
    }


def _default_dict(factory: Any = None) -> dict[str, Any]:
    return {}


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any = False,
    hooks: Any = None, metadata: Any = None,
) -> Tensor:  # fmt: skip
    if not isinstance(storage, Storage):
        raise TypeError
    return Tensor(storage, offset, shape, strides, storage.dtype)


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any,
    dtype: Any, metadata: Any = None,
) -> Tensor:  # fmt: skip
    if not isinstance(storage, Storage) or not isinstance(dtype, Global):
        raise TypeError
    return Tensor(storage, offset, shape, strides, DTYPES[dtype.name])


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError
    return data


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
}


def _tensor_with_attributes(function: Any, cls: Any, arguments: Any, state: Any = None) -> Tensor:
    if not isinstance(function, Global) or type(arguments) is not tuple:
        raise TypeError
    if len(arguments) > _MOST_ARGUMENTS:
        raise TypeError
    return _TENSORS[function.name](*arguments)


_CALLABLES: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "collections defaultdict": _default_dict,
    "torch._tensor _rebuild_from_type": _tensor_with_attributes,
    "torch._tensor _rebuild_from_type_v2": _tensor_with_attributes,
    **_TENSORS,
}

# Only ever mentioned, as the factory of a defaultdict is.
_CONSTANTS = frozenset(
    f"{module} {name}"
    for module in ("builtins", "__builtin__")
    for name in ("list", "dict", "tuple", "int", "long", "float", "str", "unicode", "bool", "bytes")
)


def check_global(name: str) -> Global:
    """A name that a pickle mentions, as "module name".

    Raises:
      FormatError: if it is not among those that weights need.
    """
    if (
        name in _CALLABLES
        or name in _INERT
        or name in _CONSTANTS
        or name in DTYPES
        or name in STORAGE_DTYPES
    ):
        return Global(name)
    dotted = quote(".".join(name.split(" ", 1)))
    if name.startswith(("torch.nn.modules", "torch.fx", "torch.jit", "__torch__")):
        raise FormatError(
            f"holds a whole PyTorch module (its class {dotted} is code, which is never run here); "
            + INSTEAD
        )
    if name.startswith(("torch Q", "torch.cuda Q")) or "qtensor" in name:
        raise FormatError(
            f"holds quantised tensors ({dotted}), which are not read; save the model unquantised"
        )
    raise FormatError(
        f"is refused: its pickle names {dotted}, which is not among the few names that weights "
        f"need, and nothing of it was run; {INSTEAD}"
    )


def call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """What a call that a pickle asks for stands for.

    Args:
      function: a global that was checked.
      arguments: untrusted.

    Returns:
      A `Tensor`, a dict, or an `Inert`.

    Raises:
      TypeError, LookupError: if it makes no sense.
    """
    if len(arguments) > _MOST_ARGUMENTS:
        raise TypeError
    if function.name in _INERT:
        return Inert(function.name)
    return _CALLABLES[function.name](*arguments)
