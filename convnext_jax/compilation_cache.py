"""JAX's cache of compiled programs on disk, which the programs of this library have on.

A run that is started again, after a preemption say, then loads its step instead of compiling it.
JAX keys an entry by the program, the versions of JAX and of the backend, the compiler's flags, and
the devices; on a CPU by its instruction set as well, so machines of different kinds may share a
directory. Of several processes, the first alone writes (https://docs.jax.dev, "Persistent
compilation cache"): the others find its entries only in a directory that all of them see.

What lies there is code that will be run. So the default directory is the user's own.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

_log = logging.getLogger("convnext_jax")

_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/convnext_jax/compiled`, below `~/.cache` where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "convnext_jax" / "compiled"


def use_compilation_cache() -> None:
    """Turns the cache on for the rest of the process; call it before anything is compiled.

    Where JAX has been told a directory, by `JAX_COMPILATION_CACHE_DIR` or in code, that one is
    taken; else it is `default_directory()`. An empty `JAX_COMPILATION_CACHE_DIR`, or
    `JAX_ENABLE_COMPILATION_CACHE=false`, leaves the cache off. A directory that cannot be written
    is said in one sentence, and only read from; without one the cache stays off.
    """
    directory = jax.config.values["jax_compilation_cache_dir"]
    if directory is None and jax.config.values["jax_enable_compilation_cache"]:
        directory = str(default_directory())
    # An empty name would count as a directory to some of JAX's code.
    jax.config.update("jax_compilation_cache_dir", directory or None)
    if cache_directory() is None or "://" in directory:
        return
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        if jax.process_index() == 0:
            tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        readable = os.access(directory, os.R_OK | os.X_OK) and os.path.isdir(directory)
        _log.warning(
            f"compiled programs are {'only read from' if readable else 'not kept:'} {directory}, "
            f"which cannot be written ({error.strerror}); JAX_COMPILATION_CACHE_DIR names another "
            "directory"
        )
        if readable:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
        else:
            jax.config.update("jax_compilation_cache_dir", None)


def cache_directory() -> str | None:
    """Where JAX keeps compiled programs; None where it keeps none."""
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return jax.config.values["jax_compilation_cache_dir"] or None


class CacheHits:
    """Counts, while it is entered, the programs that this process takes up and those it had.

    Attributes:
      requests: programs that were looked up in the cache.
      hits: those of them that were there.
    """

    def __init__(self) -> None:
        self.requests = self.hits = 0

    def __enter__(self) -> CacheHits:
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_listener(self._count)

    @property
    def all(self) -> bool:
        """Whether all programs came from the cache, and there was one."""
        return self.hits == self.requests > 0

    def _count(self, event: str, **_: Any) -> None:
        self.requests += event == _REQUEST
        self.hits += event == _HIT
