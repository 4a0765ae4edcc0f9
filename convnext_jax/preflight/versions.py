"""What runs here: the versions and settings that decide which programs XLA makes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from convnext_jax.version import __version__

# What is compiled, stored or read depends on these.
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Of the environment, what changes the compiled program; addresses and numbers of processes differ.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def versions() -> dict[str, str]:
    """Names and versions of this process, to be compared with the others'.

    Returns:
      "python", each package that is installed, "convnext_jax" with a digest of its source, and each
      flag of the environment that is set.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["convnext_jax"] = f"{__version__} (source {_source_digest()})"
    found |= {name: os.environ.get(name, "unset") for name in _FLAGS}
    return found


def describe(found: dict[str, str]) -> str:
    """The ones that a person asks for, in a line."""
    shown = [f"{name} {found[name]}" for name in ("python", "jax", "jaxlib")]
    libtpu = "no libtpu" if found["libtpu"] == "none" else f"libtpu {found['libtpu']}"
    flags = [f"{name}={found[name]}" for name in _FLAGS if found[name] != "unset"]
    return ", ".join([*shown, libtpu, f"convnext_jax {found['convnext_jax']}", *flags])


def _source_digest() -> str:
    """Tells checkouts of one version number apart."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
