"""How files name their tensors: one table per layout. `families` says which network has which."""

from convnext_jax.convert.layouts.table import Layout, Transform, collection_of

__all__ = ["Layout", "Transform", "collection_of"]
