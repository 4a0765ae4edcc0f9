"""What a process is told, by its arguments, its environment or the platform, and what follows."""

import argparse
import contextlib
import io
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import jax
import pytest
from jax._src.clusters import ClusterEnv

from convnext_jax import cli
from convnext_jax.distributed import joining
from convnext_jax.distributed.peers import Loss
from convnext_jax.errors import RunInterruptedError, RunStoppedError, UserError


class FakePeers:
    """Takes the place of `Peers` and writes down what happens."""

    happened: list
    news = None

    def __init__(self, process, processes, links, *, on_loss):
        self.happened.append(("watch", process, processes, links))
        assert on_loss is joining._exit

    def loss(self, seconds=0.0):
        self.happened.append("asked for news")
        return self.news

    def leave(self):
        self.happened.append("left")

    def abandon(self, message, status):
        self.happened.append(("abandoned", message, status))


@pytest.fixture
def happened(monkeypatch):
    """No other processes, no platform, and a list of what would have been done."""
    found = []

    def meet(address, process, processes, *, timeout):
        found.append(("meet", address, process, processes, timeout))
        return ["links"]

    @contextlib.contextmanager
    def explained_by(peers):
        found.append("aborts are explained")
        try:
            yield
        finally:
            found.append("aborts are not explained")

    for name in list(os.environ):
        if name.startswith(("JAX_CO", "JAX_NUM_PR", "JAX_PROC", "SLURM", "OMPI", "KUBERN", "TPU_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [])
    monkeypatch.setattr(FakePeers, "happened", found, raising=False)
    monkeypatch.setattr(joining, "Peers", FakePeers)
    monkeypatch.setattr(joining, "meet", meet)
    monkeypatch.setattr(joining.aborting, "explained_by", explained_by)
    monkeypatch.setattr(joining, "_exits_at_once", False)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: found.append(("initialize", a, k))
    )
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: found.append("shutdown"))
    return found


def parse(*argv):
    parser = argparse.ArgumentParser()
    joining.add_arguments(parser)
    return parser.parse_args(argv)


def run(*argv, error=None):
    with joining.joined(parse(*argv)):
        FakePeers.happened.append("run")
        if error is not None:
            raise error


THREE = ("--coordinator", "host:1234", "--num_processes", "4", "--process_id", "2")
MET = [
    ("meet", "host:1234", 2, 4, 300.0),
    ("watch", 2, 4, ["links"]),
    "aborts are explained",
    (
        "initialize",
        ("host:1234", 4, 2),
        {"cluster_detection_method": "deactivate", "initialization_timeout": 300},
    ),
]
PARTED = ["left", "shutdown", "aborts are not explained"]


def test_one_process_does_nothing(happened):
    run()
    assert happened == ["run"]


def test_told_by_arguments(happened):
    run(*THREE)
    assert happened == [*MET, "run", *PARTED]
    assert not joining.exits_at_once()


def test_told_by_the_environment(happened, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    run()
    assert happened == [*MET, "run", *PARTED]
    # Arguments say it louder, 0 too.
    happened.clear()
    run("--process_id", "0", "--coordinator", "other:1", "--join_timeout", "7.5")
    assert happened[0] == ("meet", "other:1", 0, 4, 7.5)
    assert happened[3] == (
        "initialize",
        ("other:1", 4, 0),
        {"cluster_detection_method": "deactivate", "initialization_timeout": 8},
    )


def test_an_empty_variable_is_none(happened, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "")
    run()
    assert happened == ["run"]


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (THREE[:2], "--num_processes and --process_id are not given"),
        (THREE[2:], "--coordinator is not given"),
        (THREE[:4], "--process_id is not given"),
        (("--process_id", "0"), "--coordinator and --num_processes are not given"),
    ],
)
def test_half_told(happened, argv, missing):
    with pytest.raises(UserError, match=missing):
        run(*argv)
    assert happened == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_processes", "0"), "--num_processes is 0; there is at least 1"),
        (("--num_processes", "-4"), "--num_processes is -4; there is at least 1"),
        ((*THREE, "--join_timeout", "0"), r"--join_timeout is 0\.0; it must be a number of sec"),
        ((*THREE, "--join_timeout", "-1"), r"--join_timeout is -1\.0"),
        ((*THREE, "--join_timeout", "nan"), "--join_timeout is nan"),
        ((*THREE, "--join_timeout", "inf"), "--join_timeout is inf"),
    ],
)
def test_numbers_that_make_no_sense(happened, argv, message):
    with pytest.raises(UserError, match=message):
        run(*argv)
    assert happened == []


def test_a_variable_that_is_no_number(happened, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(UserError, match="environment's JAX_PROCESS_ID is 'two'; it must be a"):
        run()


def platform(monkeypatch, *, address="pod-0:8482", processes=4, process=3, error=None):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [])

    class Platform(ClusterEnv):
        @classmethod
        def is_env_present(cls):
            if isinstance(error, Warning):
                warnings.warn(error, stacklevel=1)
                return False
            return True

        @classmethod
        def get_coordinator_address(cls, timeout_secs, override_coordinator_port):
            if error is not None:
                raise error
            assert timeout_secs == 300
            return address

        @classmethod
        def get_process_count(cls):
            return processes

        @classmethod
        def get_process_id(cls):
            return process


def test_detected_on_a_platform(happened, monkeypatch):
    platform(monkeypatch)
    run()
    assert happened == [
        ("meet", "pod-0:8482", 3, 4, 300.0),
        ("watch", 3, 4, ["links"]),
        "aborts are explained",
        # JAX detects it anew, and with it which devices are whose.
        ("initialize", (), {"initialization_timeout": 300}),
        "run",
        *PARTED,
    ]


def test_a_platform_of_one_process(happened, monkeypatch):
    platform(monkeypatch, processes=1, process=0)
    run()
    assert happened == ["run"]


@pytest.mark.parametrize("more", [(), ("--process_id", "0")])
def test_alone_on_a_platform_by_request(happened, monkeypatch, more):
    platform(monkeypatch, error=RuntimeError("pod has no controller"))
    run("--num_processes", "1", *more)
    assert happened == ["run"]


def test_arguments_say_it_louder_than_the_platform(happened, monkeypatch):
    platform(monkeypatch)
    run(*THREE)
    assert happened == [*MET, "run", *PARTED]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Kubernetes API Error: 403 - Forbidden\nIt appears that"),
        OSError("no route to the metadata server"),
        KeyError("job-name"),
        ValueError("unsupported worker-network-endpoints format"),
    ],
)
def test_a_platform_that_does_not_say(happened, monkeypatch, error):
    platform(monkeypatch, error=error)
    with pytest.raises(RunInterruptedError) as caught:
        run()
    first = str(error).splitlines()[0]
    assert str(caught.value) == (
        "the platform does not say where the other processes are "
        f"({type(error).__name__}: {first}); give --coordinator, --num_processes and --process_id, "
        "or --num_processes=1 for none"
    )
    assert happened == []


def test_what_the_platform_warns_of_is_one_line(happened, monkeypatch, caplog):
    platform(monkeypatch, error=UserWarning("\nthe `kubernetes` package\n  is not installed"))
    with caplog.at_level(logging.WARNING, logger="convnext_jax"):
        run()
    assert [r.getMessage() for r in caplog.records] == ["the `kubernetes` package is not installed"]
    assert happened == ["run"]


def test_others_that_never_came(happened, monkeypatch):
    def meet(*arguments, **options):
        raise RunInterruptedError("1 of 4 processes have not joined")

    monkeypatch.setattr(joining, "meet", meet)
    assert cli.run(lambda argv: run(*THREE), []) == 75
    assert happened == []


def test_all_stop_together(happened):
    with pytest.raises(RunStoppedError, match="loss is nan"):
        run(*THREE, error=RunStoppedError("loss is nan"))
    assert happened == [*MET, "run", *PARTED]
    assert not joining.exits_at_once()


def test_a_mistake_is_told_at_once(happened):
    with pytest.raises(UserError):
        run(*THREE, error=UserError("no such file; give another"))
    assert happened[len(MET) + 1 :] == [
        ("abandoned", "no such file; give another", 2),
        "aborts are not explained",
    ]
    assert joining.exits_at_once()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Gloo: connection reset\nand so on"), "RuntimeError: Gloo: connection reset"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_another_failure_may_be_the_echo_of_a_loss(happened, error, told):
    with pytest.raises(type(error)):
        run(*THREE, error=error)
    assert happened[len(MET) + 1 :] == [
        "asked for news",
        ("abandoned", f"{told}; see its own messages", 1),
        "aborts are not explained",
    ]
    assert joining.exits_at_once()


def test_a_failure_to_initialise_is_told(happened, monkeypatch):
    def initialize(*arguments, **options):
        raise RuntimeError("address in use")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(RuntimeError):
        run(*THREE)
    assert ("abandoned", "RuntimeError: address in use; see its own messages", 1) in happened
    assert "run" not in happened


def test_a_second_interrupt_does_not_wait_either(happened, monkeypatch):
    def loss(self, seconds=0.0):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakePeers, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        run(*THREE, error=KeyboardInterrupt())
    assert joining.exits_at_once()


@pytest.mark.parametrize("error", [None, RunInterruptedError("saved at step 7")])
def test_a_bad_parting_costs_nothing(happened, monkeypatch, caplog, error):
    """All is done and saved by then; but nobody must wait at the interpreter's end."""

    def shutdown():
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: barrier timed out\nand so on")

    monkeypatch.setattr(jax.distributed, "shutdown", shutdown)
    with contextlib.nullcontext() if error is None else pytest.raises(RunInterruptedError):
        run(*THREE, error=error)
    assert joining.exits_at_once()
    assert "did not part in good order: JaxRuntimeError: DEADLINE_EXCEEDED" in caplog.text


class Exited(BaseException):
    pass


@pytest.fixture
def exits(monkeypatch, capsys):
    """`os._exit`, as far as that can be watched; standard error's file is pytest's own."""
    statuses = []

    def leave(status):
        statuses.append(status)
        if threading.current_thread() is threading.main_thread():
            raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(joining, "_FLUSH_SECONDS", 0.05)
    yield statuses
    # The last resort, which would have found no process any more.
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def test_a_loss_ends_the_process_with_its_sentence(exits, capsys):
    print("unfinished", end="")
    with pytest.raises(Exited):
        joining._exit(Loss("process 1 of 2 (host) stopped: no such file", 2))
    assert exits[0] == 2
    assert capsys.readouterr() == (
        "unfinished",
        "stopped: process 1 of 2 (host) stopped: no such file\n",
    )


def test_native_code_writes_nothing_behind_the_sentence():
    program = """
        import os
        from convnext_jax.distributed import joining
        from convnext_jax.distributed.peers import Loss

        def leave(status, really=os._exit):
            os.write(2, b"Socket closed, from another thread")
            really(status)

        os.write(2, b"Socket closed\\n")
        os._exit = leave
        joining._exit(Loss("process 1 of 2 (host) ended", 75))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert run.returncode == 75
    assert run.stderr == "Socket closed\nstopped: process 1 of 2 (host) ended\n"


def test_a_closed_standard_error_keeps_no_process():
    program = (
        "from convnext_jax.distributed import joining; "
        "from convnext_jax.distributed.peers import Loss; joining._exit(Loss('ended', 75))"
    )
    run = subprocess.run(f'"{sys.executable}" -c "{program}" 2>&-', shell=True)
    assert run.returncode == 75


def test_a_stream_that_is_stuck_keeps_no_process(exits, monkeypatch):
    class Stuck(io.StringIO):
        def flush(self):
            while not exits:
                time.sleep(0.01)

    monkeypatch.setattr(sys, "stdout", Stuck())
    with pytest.raises(Exited):
        joining._exit(Loss("process 1 of 2 (host) ended", 75))
    assert exits[0] == 75


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("no such file"), 2, "error: no such file\n"),
        (RuntimeError("broken"), 1, "RuntimeError: broken\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_program_exits_at_once_where_others_wait(
    happened, exits, capsys, error, status, printed
):
    with pytest.raises(Exited):
        cli.run(lambda argv: run(*THREE, error=error), [])
    assert exits == [status]
    assert capsys.readouterr().err.endswith(printed)


def test_the_program_returns_where_nobody_waits(happened, exits):
    assert cli.run(lambda argv: run(*THREE), []) == 0
    assert cli.run(lambda argv: run(*THREE, error=RunStoppedError("")), []) == 1
    assert cli.run(lambda argv: run(*THREE, error=RunInterruptedError("")), []) == 75
    assert cli.run(lambda argv: run(error=KeyboardInterrupt()), []) == 130
    assert exits == []
