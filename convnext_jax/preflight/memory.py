"""Whether a host's memory, shared memory and open files suffice for the loader and the saves."""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path

import jax
from ml_collections import ConfigDict

from convnext_jax import experiment
from convnext_jax.data.loader import default_workers
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError
from convnext_jax.preflight.description import process_bytes
from convnext_jax.preflight.examination import Finding, Status
from convnext_jax.training.state import TrainState

SHARED_MEMORY = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")

# The loader's default; with two more, one in the making and one on its way.
_PREFETCH = 2
# Batches that this process holds itself: three on their way to the devices, and one to come.
_OWN_BATCHES = 4
# A worker process of the loader, what it shares with the others counted in part (165 MB measured).
_WORKER_BYTES = 200 * 2**20
# Beyond this share, the program's own code and the compiler may find no room.
_TIGHT = 0.8
# A worker keeps a file open for each shard that it has read; ImageNet has a thousand.
_FILES_WANTED = 4096


@dataclasses.dataclass(frozen=True)
class Need:
    """What one process takes of its host, in bytes.

    Attributes:
      shared: in /dev/shm, which is memory too.
      workers: the interpreters of worker processes.
      batches: in this process.
      state: a copy of its part of the training state, while a checkpoint is being saved.
    """

    shared: int
    workers: int
    batches: int
    state: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.shared + self.workers + self.batches + self.state


def need(config: ConfigDict, evaluates: bool, state: TrainState) -> Need:
    """Estimates what this process takes while it evaluates, when both loaders are open.

    Args:
      config: of the run.
      evaluates: whether it has an evaluation set.
      state: abstract, with shardings.

    Returns:
      An upper bound, but for the program's own code and the compiler.
    """
    workers = default_workers() if config.data.workers is None else config.data.workers
    pixels = config.batch_size * config.data.image_size**2
    if evaluates:
        pixels += config.eval_batch_size * experiment.eval_image_size(config) ** 2
    batches = pixels // jax.process_count() * 3
    made_ahead = (_PREFETCH + 2) * batches
    return Need(
        shared=workers * made_ahead,
        workers=(2 if evaluates else 1) * workers * _WORKER_BYTES,
        batches=_OWN_BATCHES * batches + (0 if workers else made_ahead),
        state=process_bytes(state),
    )


def host_memory(
    config: ConfigDict, eval_source: Source | None, state: TrainState, processes: int
) -> Finding[None]:
    """Holds the memory that is free to what all processes of this host will take.

    Args:
      config: of the run.
      eval_source: its evaluation set, if any.
      state: abstract, with shardings.
      processes: on this host.

    Raises:
      UserError: where the free memory can't be told.
    """
    wanted = need(config, eval_source is not None, state)
    free, bound = available()
    total = wanted.total * processes
    parts = (
        f"batches {_gib(wanted.shared + wanted.batches)}, worker processes "
        f"{_gib(wanted.workers)}, state {_gib(wanted.state)}"
    ) + (f", for each of {processes} processes" if processes > 1 else "")
    if total > free:
        return Finding(
            f"{_gib(free)} available ({bound}), but about {_gib(total)} needed: {parts}",
            None,
            Status.FAILED,
            "set fewer config.data.workers, or give the container or machine more memory",
            measure=free - total,
        )
    tight = total > _TIGHT * free
    return Finding(
        f"{_gib(free)} available ({bound}), about {_gib(total)} needed: {parts}",
        None,
        Status.WARNING if tight else Status.OK,
        "little is left for the program itself: set fewer config.data.workers" if tight else "",
        measure=free - total,
    )


def shared_memory(
    config: ConfigDict, eval_source: Source | None, state: TrainState, processes: int
) -> Finding[None]:
    """Holds what is free in /dev/shm to what the workers' batches will take.

    The loader looks as well, but when evaluation begins it finds training's batches there already.

    Args:
      config: see `host_memory`.
      eval_source: see `host_memory`.
      state: see `host_memory`.
      processes: see `host_memory`.
    """
    total = need(config, eval_source is not None, state).shared * processes
    if not total:
        return Finding("not used: config.data.workers is 0", None)
    if not SHARED_MEMORY.is_dir():
        return Finding(f"there is no {SHARED_MEMORY} here", None)
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if total > free:
        return Finding(
            f"{_gib(free)} free in {SHARED_MEMORY}, but up to {_gib(total)} needed for the "
            "batches of worker processes",
            None,
            Status.FAILED,
            "enlarge it (docker run --shm-size=…; in Kubernetes an emptyDir of medium Memory; "
            "mount -o remount,size=…), or set fewer config.data.workers",
            measure=free - total,
        )
    return Finding(
        f"{_gib(free)} free in {SHARED_MEMORY}, up to {_gib(total)} needed",
        None,
        measure=free - total,
    )


def open_files() -> Finding[None]:
    """Holds the bound on open files to what data sets of many shards need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES_WANTED:
        return Finding(
            f"a process may open {soft:,} files (at most {hard:,})",
            None,
            Status.WARNING,
            f"say `ulimit -n {_FILES_WANTED}` before the command: a data set of a thousand shards "
            "would end in 'Too many open files'",
            measure=soft,
        )
    text = "any number of" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    return Finding(f"a process may open {text} files", None)


def available() -> tuple[int, str]:
    """Bytes that this process can still have, and what bounds them.

    A container's own bound is that of its cgroup: /proc/meminfo tells of the whole machine.

    Raises:
      UserError: where neither can be read.
    """
    bounds = []
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        bounds.append((int(fields["MemAvailable"].split()[0]) * 1024, "the machine's"))
    limited = cgroup_available()
    if limited is not None:
        free, limit = limited
        bounds.append((free, f"its cgroup's, of {_gib(limit)}"))
    if not bounds:
        raise UserError("the free memory can't be told on this system")
    return min(bounds)


def cgroup_available() -> tuple[int, int] | None:
    """Bytes that the tightest of this process's cgroups leaves, and its limit, if it has one."""
    found: list[tuple[int, int]] = []
    for line in OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit_file, use_file = CGROUPS, "memory.max", "memory.current"
            cache_field = "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_file, use_file = (
                CGROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
            cache_field = "total_inactive_file"
        else:
            continue
        group = root / name.lstrip("/")
        # A container may see its own group as the root, under a name from outside.
        for directory in (group, *group.parents):
            limit = _number(directory / limit_file)
            # Of version 1 the number for "none" is near the largest there is.
            if limit is not None and limit < 2**60:
                used = _number(directory / use_file) or 0
                found.append((limit - used + _cache(directory, cache_field), limit))
            if directory == root:
                break
    return min(found, default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cache(directory: Path, field: str) -> int:
    """What the kernel would give back when asked: pages of files that nobody has used lately."""
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == field), 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
