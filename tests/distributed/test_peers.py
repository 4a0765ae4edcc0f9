"""Processes that watch each other: none waits for one that is gone, each knows which it was."""

import contextlib
import itertools
import socket
import threading
import time

import pytest
from threads import Result, wait_until

from convnext_jax.distributed import peers as peers_module
from convnext_jax.distributed.link import LONGEST_TEXT, Link
from convnext_jax.distributed.peers import Loss, Peers

HERE = socket.gethostname()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(peers_module, "_PACE_SECONDS", 0.02)
    monkeypatch.setattr(peers_module, "_HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(peers_module, "_FAREWELL_SECONDS", 0.2)


class Star:
    """Process 0 and those that are connected to it, in this process; `kill` makes one vanish."""

    def __init__(self, processes, **options):
        self.losses = [[] for _ in range(processes)]
        self.links = [[] for _ in range(processes)]
        for process in range(1, processes):
            hub, spoke = socket.socketpair()
            self.links[0].append(Link(hub, process, f"host{process}"))
            self.links[process].append(Link(spoke, 0, "host0"))
        self.peers = [
            Peers(i, processes, links, on_loss=self.losses[i].append, **options)
            for i, links in enumerate(self.links)
        ]

    def kill(self, process):
        """As the kernel does with a process's connections; it hears nothing of it itself."""
        self.peers[process]._begin_to_end()
        for link in self.links[process]:
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_RDWR)

    def told(self, but=()):
        """What each of the others was told, once all were told something."""
        others = [losses for i, losses in enumerate(self.losses) if i not in but]
        wait_until(lambda: all(others))
        assert [len(losses) for losses in others] == [1] * len(others)
        return {losses[0] for losses in others}

    def quiet(self, but=()):
        return not any(losses for i, losses in enumerate(self.losses) if i not in but)


@pytest.fixture
def star():
    stars = []

    def make(processes, **options):
        stars.append(Star(processes, **options))
        return stars[-1]

    yield make
    for one in stars:
        for process in range(len(one.peers)):
            one.kill(process)
        for peers in one.peers:
            peers._thread.join(5)
            assert not peers._thread.is_alive()


def test_one_that_dies_is_known_to_all(star):
    run = star(4)
    time.sleep(0.1)
    assert run.quiet()
    assert run.peers[1].loss() is None
    run.kill(2)
    [loss] = run.told(but=[2])
    assert loss == Loss(
        "process 2 of 4 (host2) ended without a word: it was killed, or its host has failed; start "
        "all processes again with the same command, and training goes on from its last checkpoint",
        75,
    )
    assert run.peers[1].loss() == loss
    assert run.losses[2] == []


def test_the_death_of_process_0_is_known_to_all(star):
    run = star(3)
    run.kill(0)
    [loss] = run.told(but=[0])
    assert loss.message.startswith("process 0 of 3 (host0) ended without a word")
    assert loss.status == 75


def test_one_that_died_before_it_was_watched(star):
    hub, spoke = socket.socketpair()
    spoke.close()
    losses = []
    peers = Peers(0, 2, [Link(hub, 1, "host1")], on_loss=losses.append)
    assert peers.loss(5).status == 75
    assert len(losses) == 1


def test_two_that_die_are_one_loss(star):
    run = star(5)
    run.kill(2)
    run.kill(4)
    [loss] = run.told(but=[2, 4])
    assert loss.message.startswith(("process 2 of 5", "process 4 of 5"))


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_is_silent_is_lost(process):
    ours, theirs = socket.socketpair()
    losses = []
    start = time.monotonic()
    link = Link(ours, 1 - process, "there")
    peers = Peers(process, 2, [link], on_loss=losses.append, silence=0.3)
    loss = peers.loss(5)
    assert 0.25 < time.monotonic() - start < 3
    assert losses == [loss]
    assert loss.message.startswith(
        f"process {1 - process} of 2 (there) has not been heard of for 0 seconds; start all"
    )
    assert loss.status == 75
    # It was given signs of life all the while.
    assert theirs.recv(1000).startswith(b"{}\n{}\n{}\n")
    theirs.close()


def test_signs_of_life(star):
    run = star(3, silence=0.4)
    time.sleep(0.8)
    assert run.quiet()


def test_who_has_long_waited_for_the_others_is_not_silent():
    hub, spoke = socket.socketpair()
    links = Link(hub, 1, "host1"), Link(spoke, 0, "host0")
    losses = []
    for link in links:
        link.heard -= 1000.0
    # The other one is slow to begin, too.
    peers = [Peers(0, 2, links[:1], on_loss=losses.append, silence=2.0)]
    time.sleep(0.2)
    peers.append(Peers(1, 2, links[1:], on_loss=losses.append, silence=2.0))
    time.sleep(0.1)
    assert losses == []
    for done in [Result(one.leave) for one in peers]:
        done.get()


def test_a_host_that_was_suspended_loses_nobody(monkeypatch):
    """It finds its clock far ahead, and what the other has said meanwhile still unread."""
    suspended, losses = [], []
    ours, theirs = socket.socketpair()

    class Clock:
        monotonic = staticmethod(lambda: time.monotonic() + 1000.0 * len(suspended))

    class Selector(peers_module.selectors.DefaultSelector):
        def select(self, timeout=None):
            if next(calls) % 2 or len(suspended) == 6:
                return super().select(timeout)
            theirs.sendall(b"{}\n")
            suspended.append(True)
            return []

    calls = itertools.count()
    monkeypatch.setattr(peers_module, "time", Clock)
    monkeypatch.setattr("convnext_jax.distributed.link.time", Clock)
    monkeypatch.setattr(peers_module.selectors, "DefaultSelector", Selector)
    peers = Peers(1, 2, [Link(ours, 0, "host0")], on_loss=losses.append, silence=500.0)
    wait_until(lambda: len(suspended) == 6)
    assert losses == []
    theirs.close()
    assert "ended without a word" in peers.loss(5).message


@pytest.mark.parametrize("process", [0, 1, 3])
def test_one_that_gives_up_says_why(star, process):
    run = star(4)
    leaving = Result(run.peers[process].abandon, "no such file a/b; give another --workdir", 2)
    [loss] = run.told(but=[process])
    assert loss == Loss(
        f"process {process} of 4 ({HERE}) stopped: no such file a/b; give another --workdir", 2
    )
    leaving.get()
    assert run.losses[process] == []


def test_process_0_that_gives_up_waits_for_the_others(star, monkeypatch):
    monkeypatch.setattr(peers_module, "_FAREWELL_SECONDS", 5.0)
    run = star(3)
    start = time.monotonic()
    run.peers[0].abandon("it rains", 1)
    assert time.monotonic() - start < 3
    assert run.told(but=[0]) == {Loss(f"process 0 of 3 ({HERE}) stopped: it rains", 1)}


def test_process_0_waits_only_so_long():
    hub, hung = socket.socketpair()
    peers = Peers(0, 2, [Link(hub, 1, "host1")], on_loss=lambda loss: None)
    start = time.monotonic()
    peers.abandon("it rains", 1)
    assert 0.15 < time.monotonic() - start < 3
    hung.close()


def test_a_long_reason_arrives_cut(star):
    run = star(3)
    run.peers[1].abandon("\N{UMBRELLA}\N{DIZZY FACE}" * 20_000, 2)
    [loss] = run.told(but=[1])
    assert len(loss.message) == LONGEST_TEXT
    assert loss.message.startswith(f"process 1 of 3 ({HERE}) stopped: \N{UMBRELLA}\N{DIZZY FACE}")
    assert loss.status == 2


def test_garbage_is_a_loss(star):
    run = star(3)
    run.links[1][0].connection.sendall(b"GET / HTTP/1.1\r\n")
    [loss] = run.told(but=[1])
    assert loss.message.startswith("process 1 of 3 (host1) ended without a word")


def test_what_was_lost_is_told_first_and_once(star):
    """A failure that follows from a loss, as of a collective operation, hides it on no process."""
    run = star(3)
    run.kill(2)
    loss = run.peers[1].loss(5)
    run.peers[1].abandon("RuntimeError: connection reset by peer", 1)
    run.peers[1].leave()
    assert run.told(but=[2]) == {loss}
    assert loss.message.startswith("process 2 of 3 (host2) ended")


def test_the_main_thread_waits_until_the_loss_is_dealt_with():
    """There `on_loss` ends the process, and must not be overtaken."""
    for wait in (
        lambda peers: peers.loss(5),
        lambda peers: (wait_until(lambda: peers._ending), peers.abandon("echo", 1)),
        lambda peers: peers.leave(0.2),
    ):
        hub, spoke = socket.socketpair()
        entered, finished = threading.Event(), threading.Event()

        def on_loss(loss, entered=entered, finished=finished):
            entered.set()
            time.sleep(0.1)
            finished.set()

        peers = Peers(1, 2, [Link(hub, 0, "host0")], on_loss=on_loss)
        spoke.close()
        wait(peers)
        assert entered.is_set()
        assert finished.is_set()


def test_all_leave_together(star, monkeypatch):
    monkeypatch.setattr(peers_module, "_FAREWELL_SECONDS", 5.0)
    run = star(4)
    start = time.monotonic()
    leaving = [Result(peers.leave) for peers in run.peers[:3]]
    time.sleep(0.3)
    assert not any(result.done for result in leaving), "process 3 is not there yet"
    run.peers[3].leave()
    for result in leaving:
        result.get()
    assert time.monotonic() - start < 3
    assert run.quiet()
    for peers in run.peers:
        assert not peers._thread.is_alive()
    assert all(link.connection.fileno() == -1 for links in run.links for link in links)


def test_process_0_may_be_the_last_to_come(star):
    run = star(3)
    leaving = [Result(peers.leave) for peers in run.peers[1:]]
    time.sleep(0.2)
    assert not any(result.done for result in leaving)
    run.peers[0].leave()
    for result in leaving:
        result.get()
    assert run.quiet()


@pytest.mark.parametrize("dies", [0, 1, 3])
def test_one_that_dies_while_the_others_wait_at_the_end(star, dies):
    """Whether it has come to its own end or not: the others would hang in JAX's last barrier."""
    run = star(4)
    waiting = {i: Result(run.peers[i].leave) for i in range(3)}
    wait_until(lambda: run.links[0][0].left and run.links[0][1].left)
    run.kill(dies)
    [loss] = run.told(but=[dies])
    assert loss.message.startswith(f"process {dies} of 4 (host{dies}) ended without a word")
    for process, result in waiting.items():
        if process != dies:
            result.get()


def test_one_that_fails_while_the_others_wait_at_the_end(star):
    run = star(3)
    waiting = [Result(run.peers[i].leave) for i in range(2)]
    wait_until(lambda: run.links[0][0].left)
    run.peers[2].abandon("disk full", 2)
    assert run.told(but=[2]) == {Loss(f"process 2 of 3 ({HERE}) stopped: disk full", 2)}
    for result in waiting:
        result.get()


def test_one_that_comes_much_later(star):
    run = star(3, silence=0.4)
    start = time.monotonic()
    early = [Result(run.peers[i].leave, 0.2) for i in range(2)]
    for result in early:
        result.get()
    assert time.monotonic() - start < 2
    # Process 0 goes on to give signs of life as long as it is there.
    time.sleep(0.6)
    start = time.monotonic()
    run.peers[2].leave()
    assert time.monotonic() - start < 1
    assert run.quiet()
