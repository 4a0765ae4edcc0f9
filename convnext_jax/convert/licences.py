"""Under what terms weights were published, as far as a file or its kind tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convnext_jax.convert.detection import Detected
from convnext_jax.convert.families import CONVNEXT


def licence(metadata: Mapping[str, Any], detected: Detected) -> str:
    """What is known of a foreign file's licence.

    The config beside the weights goes first (timm's `pretrained_cfg`, transformers' `license`).
    Without one it is that of the authors' own files, where the names are theirs or transformers'
    (arXiv 2201.03545: MIT; arXiv 2301.00808: CC-BY-NC-4.0).

    Args:
      metadata: what lies beside the tensors.
      detected: what the file holds.

    Returns:
      A clause for a person to read.
    """
    config = metadata.get("config") or {}
    for holder in (config.get("pretrained_cfg"), config):
        stated = holder.get("license") if isinstance(holder, Mapping) else None
        if isinstance(stated, str) and stated:
            return f"{stated}, as the config beside the weights says"
    origins = ("official", "transformers")
    if detected.family is CONVNEXT and detected.layout.origin in origins:
        if detected.model.use_grn:
            return "CC-BY-NC-4.0 (not for commercial use) if these are the authors' V2 weights"
        return "MIT if these are the authors' weights"
    return "not told by the file: that of whoever published it"
