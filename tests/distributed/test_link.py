"""One connection carries whole messages, whatever pieces they come in."""

import json
import socket

import pytest

from convnext_jax.distributed import link as link_module
from convnext_jax.distributed.link import LONGEST_TEXT, Link


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    link = Link(ours, 3, "host")
    yield link, theirs
    link.close()
    theirs.close()


def test_messages_come_one_by_one_and_the_rest_stays_in_the_socket(ends):
    link, theirs = ends
    theirs.sendall(b'{"a": 1}\n{"b": 2}\n{"c"')
    assert link.receive() == {"a": 1}
    # A selector, or another reader, still sees it.
    assert link.connection.recv(100, socket.MSG_PEEK) == b'{"b": 2}\n{"c"'
    assert link.receive() == {"b": 2}
    assert link.receive() == {}
    theirs.sendall(b": 3}\n")
    assert link.receive() == {"c": 3}


def test_nothing_yet_is_an_empty_message(ends, monkeypatch):
    link, theirs = ends
    link.connection.settimeout(0.01)
    heard = link.heard
    assert link.receive() == {}
    assert link.heard == heard
    theirs.sendall(b"{")
    assert link.receive() == {}
    assert link.heard > heard


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b"[1]\n", b"7\n", b"\n", b"[" * 60_000 + b"\n"],
)
def test_another_language_is_an_end(ends, garbage):
    link, theirs = ends
    theirs.sendall(garbage)
    assert link.receive() is None


def test_a_message_without_end_is_an_end(ends):
    link, theirs = ends
    received = {}
    for _ in range(20):
        theirs.sendall(b"x" * 10_000)
        received = link.receive()
        if received is None:
            return
    raise AssertionError("it would be kept for ever")


def test_the_end_of_the_connection(ends):
    link, theirs = ends
    theirs.sendall(b'{"a": 1}\n')
    theirs.close()
    assert link.receive() == {"a": 1}
    assert link.receive() is None
    link.send({"nobody": "hears it"})
    link.close()
    link.close()
    link.send({"nobody": "hears it"})
    assert link.receive() is None


def test_the_longest_text_arrives(ends):
    link, theirs = ends
    back = Link(theirs, 0, "")
    text = "\N{DIZZY FACE}" * LONGEST_TEXT
    assert len(json.dumps({"end": text, "status": 75})) < link_module._LONGEST_MESSAGE
    back.send({"end": text, "status": 75})
    message = {}
    while not message:
        message = link.receive()
    assert message["end"] == text
