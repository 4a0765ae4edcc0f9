"""Writing weights for other programs, as a safetensors file."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convnext_jax.errors import UserError


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes tensors to a .safetensors file, whole or not at all.

    Args:
      path: of the file.
      tensors: name → contiguous array.
      metadata: text that the file carries besides.
      overwrite: replace what lies there.

    Raises:
      UserError: if something lies there already, unless `overwrite`, or it can't be written.
    """
    target = Path(path)
    if target.is_dir() or (target.exists() and not overwrite):
        raise UserError(f"{target} exists already; give another path, or --overwrite for a file")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        save_file(dict(tensors), partial, metadata=dict(metadata))
        # The library makes files that their owner alone may read; a process can only ask for its
        # mask by setting it.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} can't be written ({error}); give another path") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
