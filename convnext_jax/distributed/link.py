"""One connection between two processes of a run: JSON objects, one a line."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

_LONGEST_MESSAGE = 2**16
# So many characters fit into one message, though JSON may write twelve bytes for each.
LONGEST_TEXT = 5000
_PATIENCE_SECONDS = 2.0


class Link:
    """A connection to one process.

    Attributes:
      connection: the socket.
      process: the number of the process at the other end.
      host: the name of its host.
      heard: `time.monotonic()` of the last sign of life.
      left: whether it has said that it is done.
    """

    def __init__(self, connection: socket.socket, process: int, host: str) -> None:
        """Takes over a connected socket."""
        connection.settimeout(_PATIENCE_SECONDS)
        self.connection, self.process, self.host = connection, process, host
        self.heard = time.monotonic()
        self.left = False
        self._unread = b""
        # Two threads send, and the one that reads may close meanwhile.
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends; where nobody is left to hear it nothing happens, since reading will tell."""
        with contextlib.suppress(OSError), self._lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message.

        Returns:
          An empty one where none has come whole within two seconds. None where the connection has
          ended, or speaks another language.
        """
        try:
            # Not a byte beyond this message: a selector must show what is still to be read.
            piece = self.connection.recv(_LONGEST_MESSAGE, socket.MSG_PEEK)
            piece = self.connection.recv(piece.find(b"\n") + 1 or len(piece))
        except TimeoutError:
            return {}
        except OSError:
            return None
        self._unread += piece
        if not piece or len(self._unread) > _LONGEST_MESSAGE:
            return None
        self.heard = time.monotonic()
        if not piece.endswith(b"\n"):
            return {}
        line, self._unread = self._unread, b""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self.connection.close()
