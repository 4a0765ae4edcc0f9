"""The processes of a run watch each other, so that none waits for one that is gone.

A process that has died leaves the others inside a collective operation for as long as their backend
likes, and JAX's own watch says nothing before it aborts them from C++. Here each process keeps one
connection to process 0, made by `meeting.py` before the run began. A process that dies is noticed
at once, since its kernel closes the connections; one whose host has died, by its silence; and one
that ends by a mistake of its own says which.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from convnext_jax.distributed.link import LONGEST_TEXT, Link
from convnext_jax.errors import RESUME_STATUS

_PACE_SECONDS = 0.2
_HEARTBEAT_SECONDS = 5.0
# Compilation and the like release Python's lock, so a living process is never silent for so long.
_SILENCE_SECONDS = 100.0
# For the others to go, once they have been told to.
_FAREWELL_SECONDS = 5.0


class Loss(NamedTuple):
    """Why the run can't go on.

    Attributes:
      message: one sentence, naming the process.
      status: with which this process should exit.
    """

    message: str
    status: int


class Peers:
    """The other processes of a run, from the moment when all of them are there."""

    def __init__(
        self,
        process: int,
        processes: int,
        links: Iterable[Link],
        *,
        on_loss: Callable[[Loss], None],
        silence: float = _SILENCE_SECONDS,
    ) -> None:
        """Starts to watch, in a thread.

        Args:
          process: this process's number.
          processes: how many there are.
          links: from process 0 to all others, from each of these to process 0.
          on_loss: called once, in the watching thread, when another process is lost.
          silence: seconds after which a process that says nothing is taken for lost.
        """
        self._process, self._processes = process, processes
        self._links = {link.process: link for link in links}
        self._on_loss, self._silence = on_loss, silence
        self._loss: Loss | None = None
        self._lost, self._over = threading.Event(), threading.Event()
        # From here on it is no news that others end.
        self._ending = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for link in self._links.values():
            # It may have waited for long until all were there, and had nothing to say.
            link.heard = time.monotonic()
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def loss(self, seconds: float = 0.0) -> Loss | None:
        """What has been lost, waiting up to `seconds` for the news of it.

        If there is news it returns only after `on_loss`, which may have ended the process by then.
        """
        if self._lost.wait(seconds):
            self._thread.join()
        return self._loss

    def leave(self, seconds: float = 60.0) -> None:
        """Ends well: when all have come to their end, one that is lost until then is a loss.

        Args:
          seconds: how long to wait for them at most.
        """
        if self._process != 0:
            self._tell_all({"left": True})
        self._over.wait(seconds)
        if not self._begin_to_end():
            self.loss()
            return
        if self._process == 0:
            self._tell_all({"left": True})
        # The others close first, so that none loses what it was told. One that has not come is
        # still given signs of life.
        self._thread.join(_FAREWELL_SECONDS)

    def abandon(self, message: str, status: int) -> None:
        """Ends badly: tells the others why. Process 0 waits a moment for them to end, too.

        Args:
          message: one sentence.
          status: this process's exit status, which will be theirs.
        """
        if not self._begin_to_end():
            self.loss()
            return
        name = self._name(self._process, socket.gethostname())
        self._tell_end(Loss(f"{name} stopped: {message}", status))
        if self._process == 0:
            self._thread.join(_FAREWELL_SECONDS)

    def _begin_to_end(self, loss: Loss | None = None) -> bool:
        """Whether this is the first reason to end; only the first one counts."""
        with self._lock:
            first, self._ending = not self._ending, True
            if first and loss is not None:
                self._loss = loss
                self._lost.set()
        return first

    def _watch(self) -> None:
        beaten = 0.0
        while self._links and self._loss is None:
            # Looked at first: the whole host may be suspended for a while at any line.
            now = time.monotonic()
            if now - beaten >= _HEARTBEAT_SECONDS:
                beaten = now
                self._tell_all({})
            self._hear_all()
            for link in list(self._links.values()):
                if now - link.heard > self._silence:
                    self._lose(link, f"has not been heard of for {self._silence:.0f} seconds")
            if all(link.left for link in self._links.values()):
                self._over.set()
                if self._process != 0:
                    break
        if self._loss is not None:
            if self._process == 0:
                # They need this process's JAX service until they have ended.
                self._tell_end(self._loss)
                until = time.monotonic() + _FAREWELL_SECONDS
                while self._links and time.monotonic() < until:
                    self._hear_all()
            self._on_loss(self._loss)
            self._over.set()
        for link in list(self._links.values()):
            self._forget(link)
        self._selector.close()

    def _hear_all(self) -> None:
        for key, _ in self._selector.select(_PACE_SECONDS):
            link: Link = key.data
            message = link.receive()
            if message is None:
                if link.left and self._process != 0:
                    self._forget(link)
                else:
                    self._lose(link, "ended without a word: it was killed, or its host has failed")
            elif "end" in message:
                self._begin_to_end(Loss(str(message["end"]), int(message["status"])))
            elif "left" in message:
                link.left = True

    def _lose(self, link: Link, what: str) -> None:
        self._forget(link)
        self._begin_to_end(
            Loss(
                f"{self._name(link.process, link.host)} {what}; start all processes again with the "
                "same command, and training goes on from its last checkpoint",
                RESUME_STATUS,
            )
        )

    def _tell_end(self, loss: Loss) -> None:
        self._tell_all({"end": loss.message[:LONGEST_TEXT], "status": loss.status})

    def _tell_all(self, message: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            link.send(message)

    def _forget(self, link: Link) -> None:
        if self._links.pop(link.process, None) is not None:
            self._selector.unregister(link.connection)
            link.close()

    def _name(self, process: int, host: str) -> str:
        return f"process {process} of {self._processes} ({host})"
