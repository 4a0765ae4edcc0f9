"""One connection between two processes of a run: JSON objects, one a line."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

_LONGEST_MESSAGE = 2**16


class Link:
    """A connection to one process.

    Attributes:
      connection: the socket; reading it must not block for long.
      process: the number of the process at the other end.
      host: the name of its host.
      heard: `time.monotonic()` of the last sign of life.
      left: whether it has said that it is done.
    """

    def __init__(self, connection: socket.socket, process: int, host: str) -> None:
        """Takes over a connected socket."""
        self.connection, self.process, self.host = connection, process, host
        self.heard = time.monotonic()
        self.left = False
        self._unread = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends; where nobody is left to hear it nothing happens, since reading will tell."""
        with contextlib.suppress(OSError), self._sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, waiting for the first bytes if there are none.

        Returns:
          The whole ones; none at a timeout. None where the connection has ended, or speaks another
          language.
        """
        try:
            piece = self.connection.recv(_LONGEST_MESSAGE)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._unread = (self._unread + piece).split(b"\n")
        if not piece or len(self._unread) > _LONGEST_MESSAGE:
            return None
        self.heard = time.monotonic()
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Closes the connection."""
        self.connection.close()
