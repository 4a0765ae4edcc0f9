"""An abort from C++ that another process's end has caused is explained; any other is an abort."""

import signal
import subprocess
import sys
import textwrap

import pytest

# JAX's client aborts in a thread that Python knows nothing of, while the main thread waits in C++.
PROGRAM = """
    import ctypes, os, socket, sys, threading, time

    from convnext_jax.distributed.aborting import explained_by
    from convnext_jax.distributed.link import Link
    from convnext_jax.distributed import aborting, peers

    def on_loss(loss):
        time.sleep(0.2)
        print(loss.message, flush=True)
        os._exit(loss.status)

    libc = ctypes.CDLL(None)

    def abort():
        routine = ctypes.cast(libc.abort, ctypes.c_void_p)
        thread = ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, routine, None)
        libc.usleep(5_000_000)
        print("it lives on")

    aborting._NEWS_SECONDS = 0.3
    ours, theirs = socket.socketpair()
    watch = peers.Peers(1, 2, [Link(ours, 0, "host0")], on_loss=on_loss)
    with explained_by(watch):
        {}
    {}
"""


def run(within, after="pass"):
    program = textwrap.dedent(PROGRAM).format(within, after)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "order", ["theirs.close(); abort()", "threading.Timer(0.1, theirs.close).start(); abort()"]
)
def test_after_the_end_of_another(order):
    status, out = run(order)
    assert out.startswith("process 0 of 2 (host0) ended without a word")
    assert status == 75


@pytest.mark.parametrize("within", ["abort()", "os.kill(os.getpid(), 6)"])
def test_by_itself(within):
    assert run(within) == (-signal.SIGABRT, "")


def test_when_it_is_over():
    assert run("pass", "theirs.close(); abort()") == (-signal.SIGABRT, "")
