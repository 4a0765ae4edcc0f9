"""Whether a checkpoint can be written, asked before it is begun.

A disk that fills up in the middle of a save leaves the processes waiting for the one whose part
could not be written. Most of what can go wrong shows beforehand, and all can agree on it.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

_LONGEST_CLAUSE = 500  # bytes


def obstacle(directory: epath.Path, state: Any) -> str | None:
    """What is in the way of saving `state`; every process comes to the same answer.

    Args:
      directory: of the checkpoints. Nothing is asked of a URL.
      state: a pytree of arrays, whose size counts uncompressed, once for all processes.

    Returns:
      A clause such as "… is not writable", or None.
    """
    mine = _obstacle(directory, state)
    if jax.process_count() == 1:
        return mine
    # An array is what processes can exchange, so the clause goes round as one.
    text = (mine or "").encode()[:_LONGEST_CLAUSE]
    with jax.transfer_guard("allow"):
        every = multihost_utils.process_allgather(
            np.frombuffer(text.ljust(_LONGEST_CLAUSE, b"\0"), np.uint8)
        )
    for process, row in enumerate(every):
        if clause := np.asarray(row).tobytes().rstrip(b"\0").decode(errors="replace"):
            return clause if process == 0 else f"on process {process} {clause}"
    return None


def _obstacle(directory: epath.Path, state: Any) -> str | None:
    if "://" in os.fspath(directory):
        return None
    try:
        if not directory.is_dir():
            return f"{directory} is no longer a directory"
        if not os.access(directory, os.W_OK | os.X_OK):
            return f"{directory} is not writable"
        free = shutil.disk_usage(directory).free
    except OSError as error:  # as of a mount that has gone
        return f"{directory} can't be looked at ({error.strerror})"
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if needed > free:
        return (
            f"it takes up to {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free in "
            f"{directory}"
        )
    return None
