"""The processes of a run meet, or each of them says who is missing."""

import json
import logging
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from threads import close, connected, free_port, hello, met, service, wait_until

from convnext_jax.distributed import link as link_module
from convnext_jax.distributed import meeting
from convnext_jax.distributed.meeting import meet
from convnext_jax.errors import RunInterruptedError, UserError


@pytest.fixture
def port():
    return free_port()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(meeting, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "_PACE_SECONDS", 0.1)
    monkeypatch.setattr(link_module, "_PATIENCE_SECONDS", 0.2)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_all_join_in_any_order(port, order):
    results = {}
    for process in order:
        results[process] = met(port, process, 4)
        time.sleep(0.03)
    links = {process: result.get() for process, result in results.items()}
    assert sorted(link.process for link in links[0]) == [1, 2, 3]
    assert {link.host for link in links[0]} == {socket.gethostname()}
    for link in links[0]:
        [back] = links[link.process]
        assert back.process == 0
        link.send({"to": link.process})
        assert back.receive() == {"to": link.process}
        back.send({"from": link.process})
        assert link.receive() == {"from": link.process}
    close(*results.values())


def test_none_goes_before_all_are_there(port):
    early = [met(port, process, 3) for process in (0, 1)]
    time.sleep(0.2)
    assert not any(result.done for result in early)
    close(*early, met(port, 2, 3))


def test_ipv6(port):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    both = [met(port, process, 2, host="[::1]") for process in (0, 1)]
    close(*both)


def test_the_missing_are_counted_and_named_on_both_sides(port):
    start = time.monotonic()
    there = [met(port, process, 5, timeout=0.5) for process in (0, 2)]
    first, second = (result.raised(RunInterruptedError) for result in there)
    assert 0.4 < time.monotonic() - start < 4
    assert first == second
    here = socket.gethostname()
    assert first == (
        "3 of 5 processes have not joined within 0 seconds: 1, 3, 4; there are "
        f"0 ({here}), 2 ({here}). See whether the same command was started on the others, and "
        f"whether they reach localhost:{port}"
    )


def test_of_very_many_only_some_are_named(port):
    message = met(port, 0, 1024, timeout=0.05).raised(RunInterruptedError)
    assert message.startswith("1023 of 1024 processes have not joined")
    assert "14, 15, 16 and 1007 more; " in message
    assert len(message) < 500


def test_who_waits_says_for_whom(port, monkeypatch, caplog):
    monkeypatch.setattr(meeting, "_REPORT_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, logger="convnext_jax"):
        met(port, 1, 3, timeout=0.2).raised(RunInterruptedError)
        alone = [record.getMessage() for record in caplog.records]
        caplog.clear()
        met(port, 0, 3, timeout=0.3).raised(RunInterruptedError)
    assert alone[0].startswith("process 1 of 3 is waiting: process 0 does not answer (Connection")
    assert "waiting: 2 of 3 processes have not joined yet: 1, 2; there are 0 (" in caplog.text


def test_a_process_waits_as_long_as_process_0_does(port):
    first = met(port, 0, 3, timeout=0.5)
    second = met(port, 1, 3, timeout=0.15)
    assert second.raised(RunInterruptedError) == first.raised(RunInterruptedError)


def test_contradicting_numbers_of_processes(port):
    first = met(port, 0, 3)
    with connected(port) as second:
        second.sendall(hello(1, 3))
        lines = second.makefile("rb")
        assert lines.readline()
        message = met(port, 2, 4).raised(UserError)
        assert first.raised(UserError) == message
        assert json.loads(lines.readline()) == {"end": message, "status": 2}
        lines.close()
    assert message == (
        f"process 2 on {socket.gethostname()} was told of 4 processes, and process 0 of 3; give "
        "all the same number"
    )


def test_two_with_the_same_number(port):
    first = met(port, 0, 4)
    with connected(port) as second:
        second.sendall(hello(1, 4))
        lines = second.makefile("rb")
        assert lines.readline()
        message = met(port, 1, 4).raised(UserError)
        assert first.raised(UserError) == message
        assert json.loads(lines.readline()) == {"end": message, "status": 2}
        lines.close()
    assert message == (
        f"two processes, on elsewhere and on {socket.gethostname()}, say that they are process 1 "
        "of 4; give each its own --process_id"
    )


def test_two_that_say_they_are_process_0(port):
    first = met(port, 0, 3)
    connected(port).close()
    assert "two processes" not in met(port, 0, 3).raised(UserError)  # on one host: the port
    with connected(port) as other:
        other.sendall(hello(0, 3))
        assert "elsewhere, say that they are process 0 of 3" in first.raised(UserError)
        assert b"elsewhere, say that they are process 0 of 3" in other.recv(2000)


def test_a_port_that_is_taken(port):
    with service(port, lambda connection: None):
        message = met(port, 0, 2).raised(UserError)
    assert message == (
        f"port {port} of this host is taken, perhaps by an earlier run that has not ended; end "
        "what holds it, or give another port in --coordinator"
    )


def test_a_port_that_may_not_be_used(port, monkeypatch):
    def create_server(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(meeting.socket, "create_server", create_server)
    message = met(port, 0, 2).raised(UserError)
    assert f"port {port} of this host can't be listened at (Permission denied)" in message


@pytest.mark.parametrize("kind", ["silent", "closes", "http"])
def test_a_foreign_service_at_the_port(port, kind):
    def answer(connection):
        if kind == "http":
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        if kind != "silent":
            connection.close()

    with service(port, answer):
        message = met(port, 1, 2, timeout=0.15).raised(RunInterruptedError)
    assert message.startswith(f"process 1 of 2 did not meet the others at localhost:{port} within")
    assert "something answers there, but it is no process 0" in message


def test_strangers_neither_stop_process_0_nor_hold_it_up(port):
    start = time.monotonic()
    first = met(port, 0, 2)
    strangers = [connected(port) for _ in range(5)]
    # Silent ones, and then those who say something.
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\n",
        b"x" * 100_000,
        b"[" * 60_000 + b"\n",
        b'{"greeting": "convnext_jax 1"}\n',
        hello(1, 2, greeting="convnext_jax 99"),
        hello("1", 2),
        hello(None, None),
        b"{}\n",
        b"",
    ):
        stranger = connected(port)
        stranger.sendall(garbage)
        strangers.append(stranger)
    # Some close before they are looked at.
    for stranger in strangers[::3]:
        stranger.close()
    slow = connected(port)
    for byte in hello(1, 2):
        slow.sendall(bytes([byte]))
        time.sleep(0.001)
    [link] = first.get()
    assert (link.process, link.host) == (1, "elsewhere")
    assert time.monotonic() - start < 2
    received = slow.makefile("rb")
    assert json.loads(received.readline())["wait"] > 5
    assert json.loads(received.readline()) == {"go": True}
    # The silent ones are let go when it has begun.
    assert strangers[1].recv(100) == b""
    for connection in (received, slow, *strangers):
        connection.close()
    close(first)


def test_the_silent_are_dismissed(port, monkeypatch):
    monkeypatch.setattr(meeting, "_INTRODUCTION_SECONDS", 0.1)
    first = met(port, 0, 2)
    with connected(port) as silent:
        assert silent.recv(100) == b""
    close(first, met(port, 1, 2))


def test_very_many_come_at_once(port):
    first = met(port, 0, 300)
    start = time.monotonic()
    others = [connected(port) for _ in range(1, 300)]
    for process, other in enumerate(others, 1):
        other.sendall(hello(process, 300))
    assert len(first.get()) == 299
    assert time.monotonic() - start < 5
    for other in others:
        other.close()
    close(first)


def test_the_limit_of_open_files_is_raised_for_very_many():
    program = """
        import resource
        from convnext_jax.distributed.meeting import _allow_open_files as allow

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        allow(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, hard)
        allow(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100))
        allow(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_too_few_open_files(port, monkeypatch):
    first = met(port, 0, 3)
    with connected(port) as second:
        second.sendall(hello(1, 3))
        assert second.recv(100)

        def accept(listener):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(socket.socket, "accept", accept)
        with socket.create_connection(("localhost", port)):
            message = first.raised(UserError)
        assert "process 0 needs a connection to each of 2 others" in message
        assert json.loads(second.recv(1000)) == {"end": message, "status": 2}


def test_one_that_dies_and_comes_again(port):
    first = met(port, 0, 3)
    for _ in range(10):
        with connected(port) as dying:
            dying.sendall(hello(1, 3))
            assert dying.recv(100)
        # Its end and this beginning may be noticed in either order.
    close(first, met(port, 1, 3), met(port, 2, 3))


def test_its_end_and_its_return_are_noticed_at_once(port, monkeypatch):
    """The new connection is looked at first, while the old one's end lies unread."""
    registered, free = [], threading.Event()

    class NewestFirst(meeting.selectors.DefaultSelector):
        def register(self, file, *arguments):
            registered.append(file)
            return super().register(file, *arguments)

        def select(self, timeout=None):
            ready = super().select(timeout)
            if not free.is_set():
                assert free.wait(5)
                ready = super().select(0)
            return sorted(ready, key=lambda item: -registered.index(item[0].fileobj))

    free.set()
    monkeypatch.setattr(meeting.selectors, "DefaultSelector", NewestFirst)
    first = met(port, 0, 3)
    dying = connected(port)
    dying.sendall(hello(1, 3, host="before"))
    assert dying.recv(100)
    with connected(port) as again:
        wait_until(lambda: len(registered) == 3)
        free.clear()
        again.sendall(hello(1, 3, host="after"))
        dying.close()
        free.set()
        third = met(port, 2, 3)
        assert sorted(link.host for link in first.get()) == ["after", socket.gethostname()]
    close(first, third)


def test_the_missing_are_those_who_are_there_no_more(port):
    first = met(port, 0, 3, timeout=0.4)
    with connected(port) as dying:
        dying.sendall(hello(1, 3))
        assert dying.recv(100)
    with connected(port) as staying:
        staying.sendall(hello(2, 3))
        message = first.raised(RunInterruptedError)
    assert message.startswith("1 of 3 processes have not joined within 0 seconds: 1; ")
    assert "2 (elsewhere)" in message


def test_process_0_that_dies_and_comes_again(port):
    def dies(connection):
        connection.recv(1000)
        connection.sendall(b'{"wait": 100}\n')
        connection.close()

    second = met(port, 1, 2)
    with service(port, dies):
        time.sleep(0.2)
    assert not second.done
    close(met(port, 0, 2), second)


def test_process_0_that_never_comes(port):
    message = met(port, 1, 2, timeout=0.2).raised(RunInterruptedError)
    assert message == (
        f"process 1 of 2 did not meet the others at localhost:{port} within 0 seconds: process 0 "
        "does not answer (Connection refused). See whether it was started, with the same command, "
        "and whether this host reaches it"
    )


def test_process_0_whose_name_is_unknown(port, monkeypatch):
    def create_connection(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(meeting.socket, "create_connection", create_connection)
    message = met(port, 1, 2, timeout=0.1).raised(RunInterruptedError)
    assert "process 0 does not answer (Name or service not known)" in message


def test_process_0_that_falls_silent(port, monkeypatch):
    monkeypatch.setattr(meeting, "_GRACE_SECONDS", 0.1)
    with service(port, lambda connection: connection.sendall(b'{"wait": 0.1}\n')):
        message = met(port, 1, 2, timeout=0.2).raised(RunInterruptedError)
    assert "process 0 has let it in, and then ended or fallen silent" in message


def test_a_connection_that_met_itself_is_no_answer(port, monkeypatch):
    def create_connection(*arguments, **options):
        connection = socket.socket()
        connection.bind(("127.0.0.1", 0))
        connection.connect(connection.getsockname())
        return connection

    monkeypatch.setattr(meeting.socket, "create_connection", create_connection)
    message = met(port, 1, 2, timeout=0.1).raised(RunInterruptedError)
    assert "process 0 does not answer (nobody listens)" in message


def test_what_comes_right_after_the_beginning_is_not_lost(port):
    # As when another process is lost at that very moment.
    with service(port, lambda connection: connection.sendall(b'{"go": 1}\n{"end": "lost"}\n')):
        second = met(port, 1, 2)
        [link] = second.get()
        assert link.receive() == {"end": "lost"}
        close(second)


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:", ":80", "[]:80", "host:http", "host:0", "host:65536", "host:-1"],
)
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match=re.escape(repr(address)) + r"; it must be HOST:PORT"):
        meet(address, 1, 2, timeout=1)


def test_names_that_are_none():
    with pytest.raises(UserError, match=r"host is 'a\.\.b'; that is no host's name"):
        meet("a..b:80", 1, 2, timeout=1)


@pytest.mark.parametrize("process", [-1, 2, 7])
def test_numbers_that_are_none(process):
    with pytest.raises(UserError, match=f"this is process {process} of 2; they are counted from"):
        meet("localhost:1", process, 2, timeout=1)
