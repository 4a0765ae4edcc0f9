"""A notice that the run will be stopped is heard once, and by all processes at one step."""

import contextlib
import os
import signal
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from convnext_jax.training.preemption import Preemption


def test_alone_sigterm_is_heard_at_the_next_question():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        assert preemption.reached()
    assert signal.getsignal(signal.SIGTERM) is before
    # Whoever asks when it is over is told what was heard.
    assert preemption.reached()


def test_a_second_signal_ends_the_process(monkeypatch):
    sent = []
    kill = os.kill
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
        kill(os.getpid(), signal.SIGTERM)
        # Not only asked for: nothing is in the signal's way any more.
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, lambda *signal: None])
def test_what_handled_it_before_handles_it_again(before):
    outer = signal.signal(signal.SIGTERM, before)
    try:
        with contextlib.suppress(KeyError), Preemption():
            assert signal.getsignal(signal.SIGTERM) is not before
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_a_handler_that_python_does_not_know(monkeypatch):
    """As one that C++ has set, which can be replaced but not set again."""
    before = signal.getsignal(signal.SIGTERM)
    set_handler = signal.signal
    monkeypatch.setattr(signal, "signal", lambda *what: set_handler(*what) and None)
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    set_handler(signal.SIGTERM, before)


def test_in_another_thread_no_handler_can_be_set():
    before = signal.getsignal(signal.SIGTERM)
    heard = []

    def train():
        with Preemption() as preemption:
            heard.append((signal.getsignal(signal.SIGTERM), preemption.reached()))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert heard == [(before, False)]


def test_several_processes_ask_jax_under_rising_numbers(monkeypatch):
    asked = []

    def reached(number):
        asked.append(number)
        return number == 3

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        # The signal is the service's, or the processes would not agree on a step.
        assert signal.getsignal(signal.SIGTERM) is before
        assert [preemption.reached() for _ in range(5)] == [False, False, True, True, True]
    # Each number once: the service says yes to the very one that all have agreed on.
    assert asked == [1, 2, 3]
