"""ConvNeXt in JAX and Flax: the models, the paper's recipe, and what a pod run needs."""

import importlib
from typing import TYPE_CHECKING, Any

from convnext_jax.version import __version__

if TYPE_CHECKING:
    from convnext_jax.convert.pretrained import load_pretrained
    from convnext_jax.models import ConvNeXt, create_model, list_models

__all__ = ["ConvNeXt", "__version__", "create_model", "list_models", "load_pretrained"]

_HOMES = {"load_pretrained": "convnext_jax.convert.pretrained"}


# Late, since each of the loader's worker processes imports this package and needs no network.
def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "convnext_jax.models")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
