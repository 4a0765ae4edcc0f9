"""How the processes of a run find each other, from the command line or the platform."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import jax

from convnext_jax.distributed import aborting
from convnext_jax.distributed.meeting import meet
from convnext_jax.distributed.peers import Loss, Peers
from convnext_jax.errors import (
    ProcessFailedError,
    RunInterruptedError,
    RunStoppedError,
    UserError,
)

_DEFAULT_TIMEOUT = 300.0
# What may be the echo of another process's end is held back until the news of it has come.
_NEWS_SECONDS = 5.0
_FLUSH_SECONDS = 5.0

_log = logging.getLogger("convnext_jax")

_exits_at_once = False


class _Place(NamedTuple):
    """This process among those of the run; `detected` by JAX, from the platform."""

    address: str
    process: int
    processes: int
    detected: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --num_processes, --process_id and --join_timeout.

    Args:
      parser: of a program; its arguments go to `joined`.
    """
    group = parser.add_argument_group(
        "several processes",
        # Wrapped here, since the programs keep their examples' lines as they are.
        textwrap.fill(
            "On a TPU pod, under SLURM, Open MPI and in Kubernetes jobs nothing is to be given: "
            "the same command starts on every host. Elsewhere the first three say it, or the "
            "environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
            77,
        ),
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="this one's number, from 0")
    group.add_argument(
        "--join_timeout",
        type=float,
        default=_DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for the others (%(default).0f)",
    )


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Within it, this process is one of the run's; without others it does nothing.

    All processes come together before `jax.distributed` is initialised, and again at the end. A
    process that fails tells the others, which end with its message; if one is killed, or its host
    is lost, the others say so on standard error and exit with status 75, so that a launcher starts
    all of them again.

    Args:
      arguments: with those of `add_arguments`.

    Raises:
      UserError: if the arguments contradict each other or those of other processes.
      RunInterruptedError: if not all processes have come in time; it counts and names the missing.
    """
    global _exits_at_once
    place = _place(arguments)
    if place is None:
        yield
        return
    links = meet(place.address, place.process, place.processes, timeout=arguments.join_timeout)
    peers = Peers(place.process, place.processes, links, on_loss=_exit)
    with aborting.explained_by(peers):
        try:
            _initialise(place, arguments.join_timeout)
            yield
        except RunStoppedError:
            # All processes have stopped, at the same step.
            _leave(peers)
            raise
        except BaseException as error:
            _exits_at_once = True
            if not isinstance(error, UserError):
                peers.loss(_NEWS_SECONDS)
            peers.abandon(*_told(error))
            raise
        _leave(peers)


def exits_at_once() -> bool:
    """Whether this process must end by `os._exit`, not to wait for others that never come."""
    return _exits_at_once


def _leave(peers: Peers) -> None:
    global _exits_at_once
    peers.leave()
    try:
        jax.distributed.shutdown()
    except RuntimeError as error:
        # All is done, and nobody is needed any more.
        _exits_at_once = True
        _log.warning("the processes did not part in good order: %s", _first_line(error))


def _told(error: BaseException) -> Loss:
    if isinstance(error, UserError):
        return Loss(str(error), 2)
    if isinstance(error, ProcessFailedError):
        return Loss(str(error), 1)
    return Loss(f"{_first_line(error)}; see its own messages", 1)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _exit(loss: Loss) -> None:
    """Ends this process from the watching thread, whatever the main one is waiting for."""
    # The main thread may hold a stream, and be stuck.
    last_resort = threading.Timer(_FLUSH_SECONDS, os._exit, [loss.status])
    last_resort.daemon = True
    last_resort.start()
    sys.stdout.flush()
    _close_to_native_code()
    print(f"stopped: {loss.message}", file=sys.stderr, flush=True)
    os._exit(loss.status)


def _close_to_native_code() -> None:
    """Leaves standard error to Python alone.

    JAX's C++ threads notice the same end at the same time, and what they write of it would come
    behind the sentence that says what has happened, or into it.
    """
    if sys.stderr is None:  # it was closed when the process began
        return
    with contextlib.suppress(OSError):  # it is no file, as in a notebook
        if sys.stderr.fileno() == 2:
            sys.stderr.flush()
            sys.stderr = open(  # noqa: SIM115
                os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors
            )
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _initialise(place: _Place, timeout: float) -> None:
    # On the CPU programs that don't depend on each other would run side by side, in another order
    # on each process, and their collective operations would wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if place.detected:
        jax.distributed.initialize(initialization_timeout=math.ceil(timeout))
    else:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(timeout),
        )


def _place(arguments: argparse.Namespace) -> _Place | None:
    """Where this process stands; None for the only one."""
    if not 0 < arguments.join_timeout < math.inf:
        raise UserError(
            f"--join_timeout is {arguments.join_timeout}; it must be a number of seconds above 0"
        )
    address = arguments.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _number(arguments.num_processes, "JAX_NUM_PROCESSES")
    process = _number(arguments.process_id, "JAX_PROCESS_ID")
    if processes is not None and processes < 1:
        raise UserError(f"--num_processes is {processes}; there is at least 1")
    if processes == 1 and not process:
        return None
    given = {"--coordinator": address, "--num_processes": processes, "--process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        assert address is not None
        assert processes is not None
        assert process is not None
        return _Place(address, process, processes, detected=False)
    if len(missing) < len(given):
        raise UserError(
            f"of several processes each must be told three things; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not given"
        )
    return _detected_place(arguments.join_timeout)


def _number(argument: int | None, variable: str) -> int | None:
    value = os.environ.get(variable)
    if argument is not None or not value:
        return argument
    if not value.isdecimal():
        raise UserError(f"the environment's {variable} is {value!r}; it must be a number")
    return int(value)


def _detected_place(timeout: float) -> _Place | None:
    """What `jax.distributed.initialize` without arguments would find."""
    # JAX does not show what it detects, but by this door; it is there in all the versions that
    # this library allows.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings(record=True, action="always") as told:
            address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, math.ceil(timeout)
            )
    except Exception as error:  # each platform's own: of its files, its services, its variables
        raise RunInterruptedError(
            f"the platform does not say where the other processes are ({_first_line(error)}); give "
            "--coordinator, --num_processes and --process_id, or --num_processes=1 for none"
        ) from error
    for warning in told:
        _log.warning("%s", " ".join(str(warning.message).split()))
    if address is None or processes is None or process is None or processes == 1:
        return None
    return _Place(address, process, processes, detected=True)
