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
from typing import NamedTuple

from convnext_jax.distributed.link import Link
from convnext_jax.errors import RESUME_STATUS

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
        self._lost, self._all_left = threading.Event(), threading.Event()
        # From here on it is no news that others end.
        self._ending = False
        self._selector = selectors.DefaultSelector()
        for link in self._links.values():
            link.connection.settimeout(_HEARTBEAT_SECONDS)
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def loss(self, seconds: float = 0.0) -> Loss | None:
        """What has been lost, waiting up to `seconds` for the news of it."""
        self._lost.wait(seconds)
        return self._loss

    def leave(self, seconds: float = 60.0) -> None:
        """Ends well: process 0 when all the others have come to their end, they when it has.

        Args:
          seconds: how long to wait at most.
        """
        for link in list(self._links.values()):
            link.send({"left": True})
        self._all_left.wait(seconds)
        self._ending = True
        self._thread.join(2 * _HEARTBEAT_SECONDS)

    def abandon(self, message: str, status: int) -> None:
        """Ends badly: tells the others why. Process 0 waits a moment for them to end, too.

        Args:
          message: one sentence.
          status: this process's exit status, which will be theirs.
        """
        self._ending = True
        self._tell_all(
            Loss(f"{self._name(self._process, socket.gethostname())} stopped: {message}", status)
        )
        if self._process == 0:
            self._thread.join(_FAREWELL_SECONDS)

    def _watch(self) -> None:
        beaten = 0.0
        while self._links and not (self._ending and self._all_left.is_set()):
            if time.monotonic() - beaten >= _HEARTBEAT_SECONDS:
                beaten = time.monotonic()
                for link in self._links.values():
                    link.send({})
            self._hear_all()
            for link in list(self._links.values()):
                if time.monotonic() - link.heard > self._silence:
                    self._lose(link, f"has not been heard of for {self._silence:.0f} seconds")
            if all(link.left for link in self._links.values()):
                self._all_left.set()
        for link in list(self._links.values()):
            self._forget(link)

    def _hear_all(self) -> None:
        for key, _ in self._selector.select(0.2):
            link: Link = key.data
            messages = link.receive()
            for message in messages or ():
                link.left |= bool(message.get("left"))
                if "end" in message:
                    self._end(Loss(str(message["end"]), int(message["status"])), but=link)
            if messages is None and link.left:
                self._forget(link)
            elif messages is None:
                self._lose(link, "ended without a word: it was killed, or its host has failed")

    def _lose(self, link: Link, what: str) -> None:
        self._forget(link)
        self._end(
            Loss(
                f"{self._name(link.process, link.host)} {what}; start all processes again with the "
                "same command, and the run goes on from its last checkpoint",
                RESUME_STATUS,
            )
        )

    def _end(self, loss: Loss, but: Link | None = None) -> None:
        if self._ending:
            return
        self._ending = True
        self._loss = loss
        self._lost.set()
        if self._process == 0:
            # They need this process's JAX service until they have ended.
            self._tell_all(loss, but)
            until = time.monotonic() + _FAREWELL_SECONDS
            while self._links and time.monotonic() < until:
                self._hear_all()
        self._on_loss(loss)

    def _tell_all(self, loss: Loss, but: Link | None = None) -> None:
        for link in list(self._links.values()):
            if link is not but:
                link.send({"end": loss.message[:10_000], "status": loss.status})

    def _forget(self, link: Link) -> None:
        if self._links.pop(link.process, None) is not None:
            self._selector.unregister(link.connection)
            link.close()

    def _name(self, process: int, host: str) -> str:
        return f"process {process} of {self._processes} ({host})"
