"""Which dict of a saved file holds the weights, and what wraps their names."""

from collections.abc import Iterable, Mapping
from typing import Any

from convnext_jax.convert.format_error import FormatError, quote
from convnext_jax.convert.torch_tensors import Tensor

# Averaged weights first: where a file holds both, the published accuracy is theirs.
_GROUPS = (
    "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema",
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network",
)  # fmt: skip
_DEEPEST = 3
_MOST_DICTS = 64
# Distributed data parallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")


def _tensors(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in tree.items() if isinstance(value, Tensor)}


def _may_hold_weights(tree: Mapping[str, Any]) -> bool:
    return any(name in tree for name in _GROUPS) or bool(_tensors(tree))


def pick_group(tree: Any) -> tuple[dict[str, Tensor], str]:
    """Finds the state dict in what was saved.

    Args:
      tree: the saved object.

    Returns:
      (the tensors by name, where they were found: "" for the object itself, "model_ema",
      "state_dict.model"). What is no tensor is left out.

    Raises:
      FormatError: if there is none, or several without a known name.
    """
    if isinstance(tree, Tensor):
        raise FormatError("holds a single tensor; give a file with a model's state dict")
    if not isinstance(tree, dict):
        raise FormatError(
            f"holds {quote(tree) if isinstance(tree, str) else 'a ' + type(tree).__name__}, no "
            "state dict; save one with torch.save(model.state_dict(), path)"
        )
    path: list[str] = []
    for _ in range(_DEEPEST):
        inner = {name: value for name, value in tree.items() if isinstance(value, dict) and value}
        known = [name for name in _GROUPS if name in inner and _may_hold_weights(inner[name])]
        if not known and not _tensors(tree) and len(inner) <= _MOST_DICTS:
            known = [name for name, value in inner.items() if _tensors(value)]
            if len(known) > 1:
                raise FormatError(
                    f"holds several dicts of tensors, {', '.join(map(quote, known[:8]))}, and none "
                    "of them by a usual name; save the model's as 'model'"
                )
        if not known:
            break
        path.append(known[0])
        tree = inner[known[0]]
    tensors = _tensors(tree)
    if not tensors:
        names = ", ".join(quote(name) for name in list(tree)[:8]) or "nothing"
        raise FormatError(
            f"holds no tensors{' in ' + quote('.'.join(path)) if path else ''}, only {names}; give "
            "a file with a model's state dict"
        )
    return tensors, ".".join(path)


def common_wrapper(names: Iterable[str]) -> str:
    """The wrapper's prefix that every name has, such as "module."; "" if there is none."""
    names = list(names)
    prefix = ""
    for _ in range(_DEEPEST):
        for wrapper in _WRAPPERS:
            if all(name.startswith(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            break
    return prefix
