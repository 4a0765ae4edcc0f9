"""An end of the process by JAX's C++ code, explained and given the right exit status.

When process 0 is gone, JAX's client in each of the others aborts it at once, from a thread of its
own, before any Python can run: what a person sees is a stack trace, and a launcher a crash. The
signal of an abort is raised by the aborting thread itself, so what handles it is in fact called by
that thread, and may wait for the news of what has happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

from convnext_jax.distributed.peers import Peers

_NEWS_SECONDS = 5.0


@contextlib.contextmanager
def explained_by(peers: Peers) -> Iterator[None]:
    """Within it, an abort that another process's end has caused ends this one by `peers`.

    Any other abort is what it was.

    Args:
      peers: whose `on_loss` ends the process.
    """
    # Python's own `signal.signal` would run the handler later, in the main thread: never.
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        # The watching thread ends the process meanwhile, if it was that.
        peers.loss(_NEWS_SECONDS)
        libc.signal(number, None)  # the default
        os.kill(os.getpid(), number)

    previous = libc.signal(signal.SIGABRT, handler)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)
