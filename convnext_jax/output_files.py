"""Files that a program is asked to write: nothing that exists is lost, and mistakes show early."""

from __future__ import annotations

from pathlib import Path

from convnext_jax.errors import UserError


def check_output(path: Path | None, *, overwrite: bool) -> None:
    """Holds a file's name to what can be written, before the work that fills it.

    Args:
      path: None where none was asked for.
      overwrite: whether an existing file may be replaced.

    Raises:
      UserError: if its directory is missing, or if it exists and may not be replaced.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; give another name, or --overwrite")
