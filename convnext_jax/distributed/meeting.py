"""The processes of a run meet before it begins, and know who is missing.

`jax.distributed.initialize` waits in silence for as long as it is told, and then aborts the process
from C++. So the processes first meet here. Process 0 listens on the very port that JAX's service
will take afterwards, so that no other need be open between the hosts.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

from convnext_jax.distributed.link import Link
from convnext_jax.errors import RESUME_STATUS, RunInterruptedError, UserError

_log = logging.getLogger("convnext_jax")

_GREETING = "convnext_jax 1"
_REPORT_SECONDS = 30.0
_RETRY_SECONDS = 0.2
# For what process 0 has to say when time is up.
_GRACE_SECONDS = 10.0


def meet(address: str, process: int, processes: int, *, timeout: float) -> list[Link]:
    """Waits until all processes of a run are there.

    Args:
      address: "host:port", where process 0 listens.
      process: this process's number.
      processes: how many there are.
      timeout: seconds to wait.

    Returns:
      Links from process 0 to all others, from each of these to process 0.

    Raises:
      UserError: if the processes contradict each other, or the port is taken.
      RunInterruptedError: if not all have come in time; it says who is missing.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"the coordinator's address is {address!r}; it must be HOST:PORT")
    if not 0 <= process < processes:
        raise UserError(
            f"this is process {process} of {processes}; they are counted from 0 to {processes - 1}"
        )
    until = time.monotonic() + timeout
    if process == 0:
        return _Host(address, int(port), processes, until, timeout).wait()
    return [_visit(host.strip("[]"), int(port), process, processes, until, timeout)]


class _Host:
    """Process 0, waiting for the others."""

    def __init__(
        self, address: str, port: int, processes: int, until: float, timeout: float
    ) -> None:
        self._address, self._processes = address, processes
        self._until, self._timeout = until, timeout
        self._links: dict[int, Link] = {}
        self._selector = selectors.DefaultSelector()
        try:
            self._listener = _listen(port, processes)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {port} of this host is taken, perhaps by an earlier run that has not ended; "
                "end it, or give another port in --coordinator"
            ) from error

    def wait(self) -> list[Link]:
        """Returns when all are there."""
        report = time.monotonic() + _REPORT_SECONDS
        with self._listener, self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            while len(self._links) < self._processes - 1:
                now = time.monotonic()
                if now > self._until:
                    self._send_away(self._absence(f"within {self._timeout:.0f} seconds"))
                if now > report:
                    report = now + _REPORT_SECONDS
                    _log.info("waiting: %s", self._absence("yet"))
                for key, _ in self._selector.select(min(1.0, max(self._until - now, 0.0))):
                    if key.fileobj is self._listener:
                        self._welcome(self._listener.accept()[0])
                    else:
                        self._hear(key.data)
        for link in self._links.values():
            link.send({"go": True})
        return list(self._links.values())

    def _welcome(self, connection: socket.socket) -> None:
        hello = _read_hello(connection)
        if hello is None:  # a port scanner, or a health check
            connection.close()
            return
        link = Link(connection, int(hello["process"]), str(hello["host"]))
        there = self._links.get(link.process)
        contradiction = None
        if hello["processes"] != self._processes:
            contradiction = (
                f"process {link.process} on {link.host} was told of {hello['processes']} "
                f"processes, and process 0 of {self._processes}; give all the same number"
            )
        elif not 0 < link.process < self._processes or there is not None:
            other = socket.gethostname() if there is None else there.host
            contradiction = (
                f"two processes, on {other} and on {link.host}, say that they are process "
                f"{link.process} of {self._processes}; give each its own --process_id"
            )
        if contradiction is not None:
            self._links[-1] = link
            self._send_away(contradiction, mistake=True)
        self._links[link.process] = link
        self._selector.register(connection, selectors.EVENT_READ, link)

    def _hear(self, link: Link) -> None:
        if link.receive() is None:  # it has gone again, and may come back
            self._selector.unregister(link.connection)
            del self._links[link.process]
            link.close()

    def _absence(self, when: str) -> str:
        missing = [i for i in range(1, self._processes) if i not in self._links]
        there = {0: socket.gethostname()} | {i: link.host for i, link in self._links.items()}
        return (
            f"{len(missing)} of {self._processes} processes have not joined {when}: "
            f"{_numbers(missing)}; there are "
            f"{', '.join(f'{i} ({host})' for i, host in sorted(there.items()))}. See whether the "
            f"same command was started on the others, and whether they reach {self._address}"
        )

    def _send_away(self, message: str, *, mistake: bool = False) -> None:
        for link in self._links.values():
            link.send({"end": message, "status": 2 if mistake else RESUME_STATUS})
            link.close()
        raise UserError(message) if mistake else RunInterruptedError(message)


def _visit(
    host: str, port: int, process: int, processes: int, until: float, timeout: float
) -> Link:
    """Any other process: asks until process 0 lets it in."""
    hello = {"greeting": _GREETING, "process": process, "processes": processes}
    answered = False
    for _ in _until(until):
        try:
            connection = socket.create_connection((host, port), timeout=2.0)
        except OSError:
            continue
        link = Link(connection, 0, host)
        link.send({**hello, "host": socket.gethostname()})
        while (
            messages := link.receive()
        ) is not None and time.monotonic() < until + _GRACE_SECONDS:
            for message in messages:
                if message.get("go"):
                    return link
                if "end" in message:
                    mistake = message["status"] != RESUME_STATUS
                    raise (UserError if mistake else RunInterruptedError)(message["end"])
        answered = True
        link.close()
    raise RunInterruptedError(
        f"process {process} of {processes} was not let in at {host}:{port} within {timeout:.0f} "
        "seconds: "
        + (
            "something answers there, but it is no process 0 that waits for others. Perhaps the "
            "run has begun without this process: end all processes and start them together"
            if answered
            else "process 0 does not answer. See whether it was started, with the same command, "
            "and whether this host reaches it"
        )
    )


def _listen(port: int, backlog: int) -> socket.socket:
    # Also IPv4, where IPv6 is there; JAX's service binds the same way.
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    return socket.create_server(("", port), backlog=backlog)


def _read_hello(connection: socket.socket) -> dict[str, Any] | None:
    connection.settimeout(2.0)
    link = Link(connection, -1, "")
    messages = link.receive()
    connection.settimeout(2.0)
    if not messages or messages[0].get("greeting") != _GREETING:
        return None
    return messages[0]


def _until(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield
        time.sleep(_RETRY_SECONDS)


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:16]))
    return shown + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
