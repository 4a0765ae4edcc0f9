"""Processes of a run, played by threads of this one."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from convnext_jax.distributed.meeting import meet


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Result:
    """What a call in a thread returned or raised."""

    def __init__(self, call, *arguments, **options):
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(call, *arguments, **options)
        self._pool.shutdown(wait=False)

    def get(self, seconds=10):
        return self._future.result(seconds)

    def raised(self, kind, seconds=10):
        with pytest.raises(kind) as caught:
            self._future.result(seconds)
        assert type(caught.value) is kind
        return str(caught.value)

    @property
    def done(self):
        return self._future.done()


def met(port, process, processes, timeout=10.0, host="localhost"):
    return Result(meet, f"{host}:{port}", process, processes, timeout=timeout)


def close(*results):
    """Closes the links of those that have met."""
    for result in results:
        for link in result.get():
            link.close()


def connected(port, seconds=5):
    """A client that speaks for itself."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)


def hello(process, processes, **other):
    fields = {"greeting": "convnext_jax 1", "process": process, "processes": processes}
    return json.dumps({**fields, "host": "elsewhere", **other}).encode() + b"\n"


@contextlib.contextmanager
def service(port, answer):
    """Listens at a port, and does `answer(connection)` with each that comes."""
    held = []
    with socket.create_server(("localhost", port)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    answer(held[-1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            # Closing alone would not wake the thread.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in held:
                connection.close()


def wait_until(holds, seconds=5):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
