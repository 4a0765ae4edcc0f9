"""Texts sent between the processes of a run before its devices are known to work.

By the key-value store of JAX's coordination service, which needs neither devices nor equal
versions: a collective would hang in just the cases that are to be found.
"""

from __future__ import annotations

import time
from typing import Any

import jax

# JAX has no public name for the client; Orbax takes it from here too.
from jax._src.distributed import global_state

_PREFIX = "convnext_jax/preflight"


def place() -> tuple[int, int]:
    """This process's number and how many there are, without a look at the devices."""
    if global_state.client is None:
        return 0, 1
    return global_state.process_id, global_state.num_processes


def gather(name: str, text: str, seconds: float) -> list[str | None]:
    """Collects one text of each process on process 0.

    Args:
      name: of the exchange; each may be used once in a process's life.
      text: this process's.
      seconds: how long process 0 waits for all of them together.

    Returns:
      On process 0 the texts by process, None for one that did not come in time; elsewhere [].
    """
    process, processes = place()
    if processes == 1:
        return [text]
    _client().key_value_set(f"{_PREFIX}/{name}/{process}", text)
    if process != 0:
        return []
    deadline = time.monotonic() + seconds
    texts: list[str | None] = [text]
    for other in range(1, processes):
        texts.append(_get(f"{name}/{other}", max(deadline - time.monotonic(), 0.001)))
    return texts


def broadcast(name: str, text: str, seconds: float) -> str | None:
    """Sends a text of process 0 to all.

    Args:
      name: see `gather`.
      text: that of process 0; the others' is ignored.
      seconds: how long a process waits for it.

    Returns:
      The text, or None if it did not come in time.
    """
    process, processes = place()
    if processes == 1:
        return text
    if process == 0:
        _client().key_value_set(f"{_PREFIX}/{name}", text)
        return text
    return _get(name, seconds)


def _client() -> Any:
    return global_state.client


def _get(key: str, seconds: float) -> str | None:
    try:
        return str(_client().blocking_key_value_get(f"{_PREFIX}/{key}", int(seconds * 1000) or 1))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise
