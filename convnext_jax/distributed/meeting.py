"""The processes of a run meet before it begins, and know who is missing.

`jax.distributed.initialize` waits in silence for as long as it is told, and then aborts the process
from C++. So the processes first meet here. Process 0 listens on the very port that JAX's service
will take afterwards, so that no other need be open between the hosts.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any

from convnext_jax.distributed.link import Link
from convnext_jax.errors import RESUME_STATUS, RunInterruptedError, UserError

_log = logging.getLogger("convnext_jax")

_GREETING = "convnext_jax 1"
_REPORT_SECONDS = 30.0
_RETRY_SECONDS = 0.2
_PACE_SECONDS = 1.0
_CONNECT_SECONDS = 2.0
# How long one who has connected may take to say who it is.
_INTRODUCTION_SECONDS = 10.0
# For what process 0 has to say when time is up.
_GRACE_SECONDS = 10.0
# Of process 0: its links, as many again in JAX's service, and all else that a program opens.
_FILES_PER_PROCESS, _OTHER_FILES = 3, 1024
_SHOWN = 16


def meet(address: str, process: int, processes: int, *, timeout: float) -> list[Link]:
    """Waits until all processes of a run are there.

    Args:
      address: "host:port", where process 0 listens; an IPv6 host in brackets.
      process: this process's number.
      processes: how many there are.
      timeout: seconds to wait.

    Returns:
      Links from process 0 to all others, from each of these to process 0.

    Raises:
      UserError: if the processes contradict each other, or process 0 can't listen at the port.
      RunInterruptedError: if not all have come in time; it says who is missing.
    """
    host, _, number = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    port = int(number) if number.isdecimal() else 0
    if not host or not 0 < port < 2**16:
        raise UserError(
            f"the coordinator's address is {address!r}; it must be HOST:PORT, with a port from 1 "
            f"to {2**16 - 1}"
        )
    if not 0 <= process < processes:
        raise UserError(
            f"this is process {process} of {processes}; they are counted from 0 to {processes - 1}"
        )
    if process == 0:
        return _Host(address, port, processes, timeout).wait()
    return [_visit(host, port, process, processes, timeout)]


class _Host:
    """Process 0, waiting for the others."""

    def __init__(self, address: str, port: int, processes: int, timeout: float) -> None:
        self._address, self._processes = address, processes
        self._until, self._timeout = time.monotonic() + timeout, timeout
        self._links: dict[int, Link] = {}
        _allow_open_files(_FILES_PER_PROCESS * processes + _OTHER_FILES)
        self._listener = _listen(port, processes)
        self._selector = selectors.DefaultSelector()

    def wait(self) -> list[Link]:
        """Returns when all are there."""
        report = time.monotonic() + _REPORT_SECONDS
        with self._listener, self._selector, contextlib.ExitStack() as exits:
            exits.callback(self._dismiss_strangers)
            self._selector.register(self._listener, selectors.EVENT_READ)
            while len(self._links) < self._processes - 1:
                now = time.monotonic()
                if now > self._until:
                    self._send_away(
                        self._links.values(),
                        RunInterruptedError(self._absence(f"within {self._timeout:.0f} seconds")),
                    )
                if now > report:
                    report = now + _REPORT_SECONDS
                    _log.info("waiting: %s", self._absence("yet"))
                for key, _ in self._selector.select(
                    min(_PACE_SECONDS, max(self._until - now, 0.0))
                ):
                    if key.data is None:
                        self._accept()
                    else:
                        self._hear(key.data)
                self._dismiss_strangers(_INTRODUCTION_SECONDS)
        for link in self._links.values():
            link.send({"go": True})
        return list(self._links.values())

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._send_away(
                    self._links.values(),
                    UserError(
                        f"process 0 needs a connection to each of {self._processes - 1} others, "
                        "and its host allows it no more open files; raise `ulimit -n` there"
                    ),
                )
            return  # gone before it was let in
        # Nobody is waited for here: one that is slow must not keep the others from coming in.
        self._selector.register(connection, selectors.EVENT_READ, Link(connection, -1, ""))

    def _dismiss_strangers(self, seconds: float = 0.0) -> None:
        """Those who connected longer ago, and have not said who they are."""
        since = time.monotonic() - seconds
        links = [key.data for key in self._selector.get_map().values() if key.data is not None]
        for link in links:
            if link.process < 0 and link.heard <= since:
                self._dismiss(link)

    def _hear(self, link: Link) -> None:
        if link.connection.fileno() < 0:
            return  # dismissed since it was selected
        message = link.receive()
        if message is None:  # it has gone, and may come again; or it was no process of ours
            self._dismiss(link)
        elif message and link.process < 0:
            self._welcome(link, message)

    def _dismiss(self, link: Link) -> None:
        self._selector.unregister(link.connection)
        self._links.pop(link.process, None)
        link.close()

    def _welcome(self, link: Link, hello: dict[str, Any]) -> None:
        process, processes = hello.get("process"), hello.get("processes")
        if hello.get("greeting") != _GREETING or not (
            isinstance(process, int) and isinstance(processes, int)
        ):
            self._dismiss(link)
            return
        host = str(hello.get("host"))
        if (there := self._links.get(process)) is not None:
            # It may have died and come again, with the news of both at once.
            if any(key.data is there for key, _ in self._selector.select(0)):
                self._hear(there)
            there = self._links.get(process)
        contradiction = None
        if processes != self._processes:
            contradiction = (
                f"process {process} on {host} was told of {processes} processes, and process 0 of "
                f"{self._processes}; give all the same number"
            )
        elif process == 0 or there is not None:
            other = socket.gethostname() if there is None else there.host
            contradiction = (
                f"two processes, on {other} and on {host}, say that they are process {process} of "
                f"{processes}; give each its own --process_id"
            )
        if contradiction is not None:
            self._send_away([*self._links.values(), link], UserError(contradiction))
        link.process, link.host = process, host
        self._links[process] = link
        link.send({"wait": self._until - time.monotonic()})

    def _absence(self, when: str) -> str:
        missing = [i for i in range(1, self._processes) if i not in self._links]
        there = [f"0 ({socket.gethostname()})"]
        there += [f"{process} ({self._links[process].host})" for process in sorted(self._links)]
        return (
            f"{len(missing)} of {self._processes} processes have not joined {when}: "
            f"{_listed(missing)}; there are {_listed(there)}. See whether the same command was "
            f"started on the others, and whether they reach {self._address}"
        )

    def _send_away(self, links: Iterable[Link], error: UserError | RunInterruptedError) -> None:
        status = 2 if isinstance(error, UserError) else RESUME_STATUS
        for link in links:
            link.send({"end": str(error), "status": status})
            link.close()
        raise error


def _visit(host: str, port: int, process: int, processes: int, timeout: float) -> Link:
    """Any other process: asks until process 0 lets it in."""
    hello = {
        "greeting": _GREETING,
        "process": process,
        "processes": processes,
        "host": socket.gethostname(),
    }
    until = time.monotonic() + timeout
    report = time.monotonic() + _REPORT_SECONDS
    found = "there was no time to ask"
    while time.monotonic() < until:
        if time.monotonic() > report:
            report += _REPORT_SECONDS
            _log.info("process %d of %d is waiting: %s", process, processes, found)
        try:
            link = Link(_connect(host, port), 0, host)
        except OSError as error:
            found = (
                f"process 0 does not answer ({error.strerror or error}). See whether it was "
                "started, with the same command, and whether this host reaches it"
            )
        else:
            link.send(hello)
            found = (
                "something answers there, but it is no process 0 that waits for others. Perhaps "
                "the run has begun without this process: end all processes and start them together"
            )
            patience = until
            while (message := link.receive()) is not None and time.monotonic() < patience:
                if "go" in message:
                    return link
                if "end" in message:
                    link.close()
                    mistake = message["status"] != RESUME_STATUS
                    raise (UserError if mistake else RunInterruptedError)(message["end"])
                if "wait" in message:
                    # From here on it is process 0's time that counts.
                    patience = time.monotonic() + message["wait"] + _GRACE_SECONDS
                    found = "process 0 has let it in, and then ended or fallen silent; see its log"
            link.close()
        time.sleep(_RETRY_SECONDS)
    raise RunInterruptedError(
        f"process {process} of {processes} did not meet the others at {host}:{port} within "
        f"{timeout:.0f} seconds: {found}"
    )


def _connect(host: str, port: int) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    except UnicodeError as error:
        raise UserError(f"the coordinator's host is {host!r}; that is no host's name") from error
    # Where nobody listens, a connection within one host may have met itself: the system gave it
    # the very port that it was to connect to.
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError("nobody listens")
    return connection


def _listen(port: int, processes: int) -> socket.socket:
    # So many may come at once.
    backlog = max(processes, 128)
    try:
        # Also IPv4, where IPv6 is there; JAX's service binds the same way.
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
        return socket.create_server(("", port), backlog=backlog)
    except OSError as error:
        reason = f"can't be listened at ({error.strerror})"
        if error.errno == errno.EADDRINUSE:
            reason = "is taken, perhaps by an earlier run that has not ended"
        raise UserError(
            f"port {port} of this host {reason}; end what holds it, or give another port in "
            "--coordinator"
        ) from error


def _allow_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listed(things: list[int] | list[str]) -> str:
    shown = ", ".join(map(str, things[:_SHOWN]))
    return shown + (f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else "")
