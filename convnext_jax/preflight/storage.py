"""Whether the workdir can be written, is one and the same on all processes, and has room."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from convnext_jax.config_checks import FREE_FIELDS
from convnext_jax.errors import UserError
from convnext_jax.preflight.description import process_bytes, whole_bytes
from convnext_jax.preflight.examination import Finding, Status
from convnext_jax.recipes import base
from convnext_jax.training.state import TrainState
from convnext_jax.training.workdir import absolute_path, config_differences

# Written to see how fast that goes.
_SAMPLE_BYTES = 32 * 2**20
# A file may be seen by other hosts a moment after it was written.
_SEEN_WITHIN = 10.0


class Token:
    """A file in the workdir by which another process can tell that it is the same directory."""

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Names a file; nothing is written yet."""
        self.directory = absolute_path(workdir)
        # A new name each time: network file systems remember names that they did not find.
        self.name = f".preflight-{uuid.uuid4().hex}"
        self._written = False
        self._made: list[epath.Path] = []

    def write(self) -> Finding[str]:
        """Writes the file, and the workdir where it is missing.

        Returns:
          The file's name, which is its content too.

        Raises:
          UserError: if that can't be done.
        """
        if "://" in os.fspath(self.directory):
            raise UserError(
                f"--workdir {self.directory} is a URL; mount the bucket (gcsfuse) on every host, "
                "and give the path"
            )
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"--workdir {self.directory} is a file; give a directory")
        try:
            missing = self.directory
            while not missing.exists():
                self._made.append(missing)
                missing = missing.parent
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / self.name
            self._written = True
            path.write_text(self.name)
            read = path.read_text()
        except OSError as error:
            raise UserError(
                f"--workdir {self.directory} can't be written: {error}; give another, or the right "
                "to write there to this user"
            ) from error
        if read != self.name:
            raise UserError(f"--workdir {self.directory}: what was written is not read back")
        return Finding(f"{self.directory} can be written", self.name)

    def remove(self) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):
            if self._written:
                (self.directory / self.name).unlink(missing_ok=True)

    def remove_directories(self) -> None:
        """Removes the directories that were made for the file, as far as they are empty."""
        with contextlib.suppress(OSError, ValueError):
            for directory in self._made:
                directory.rmdir()


def same_directory(workdir: str | os.PathLike[str], name: str) -> Finding[None]:
    """Looks for the file of process 0.

    Args:
      workdir: as this process knows it.
      name: of the file, and its content.

    Raises:
      UserError: if it is not there.
    """
    path = absolute_path(workdir) / name
    until = time.monotonic() + _SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == name:
                return Finding("all processes see one and the same directory", None)
        if time.monotonic() > until:
            raise UserError(
                f"--workdir {path.parent} is not the directory that process 0 writes to; put it on "
                "a file system that all hosts share: a bucket mounted at the same path on each "
                "(gcsfuse), Filestore or NFS"
            )
        time.sleep(0.2)


def free_space(
    workdir: str | os.PathLike[str], config: ConfigDict, state: TrainState
) -> Finding[None]:
    """Holds the free space to what the checkpoints will take.

    Args:
      workdir: of the run.
      config: says how many of the newest stay; the best and one being written come on top.
      state: abstract.
    """
    directory = absolute_path(workdir)
    kept, state_bytes = config.checkpoints_kept + 2, whole_bytes(state)
    checkpoints = directory / "checkpoints"
    there = (
        len([p for p in checkpoints.iterdir() if p.name.isdigit()]) if checkpoints.exists() else 0
    )
    need = state_bytes * max(kept - there, 1)
    what = f"{kept} checkpoints of {_mib(state_bytes)}" + (f", {there} there" if there else "")
    free = shutil.disk_usage(directory).free
    if need > free:
        return Finding(
            f"{_mib(free)} free, but {_mib(need)} are needed: {what}",
            None,
            Status.FAILED,
            "free some, give another --workdir, or lower config.checkpoints_kept",
            measure=free,
        )
    return Finding(f"{_mib(free)} free, {_mib(need)} needed: {what}", None, measure=free)


def same_config(workdir: str | os.PathLike[str], config: ConfigDict) -> Finding[None]:
    """Whether a run that lies in the workdir could go on with this config.

    Raises:
      UserError: if the config there can't be read.
    """
    checkpoints = absolute_path(workdir) / "checkpoints"
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    differences = config_differences(
        workdir, config.to_dict(), ignore=FREE_FIELDS, defaults=base().to_dict()
    )
    if not steps or differences is None:
        return Finding("a new run", None)
    if differences:
        return Finding(
            f"another run lies there, {'; '.join(differences)}",
            None,
            Status.FAILED,
            "give another --workdir, or train with --allow_config_change",
        )
    return Finding(f"goes on at step {max(steps):,}", None)


def write_speed(workdir: str | os.PathLike[str], state: TrainState) -> Finding[None]:
    """Times the writing of a file to the disk, while the other processes do the same.

    Args:
      workdir: of the run.
      state: abstract, with shardings.

    Raises:
      UserError: if the disk is full or fails.
    """
    directory = absolute_path(workdir)
    path = directory / f".preflight-{uuid.uuid4().hex}"
    sample = os.urandom(2**20) * (_SAMPLE_BYTES // 2**20)
    try:
        begun = time.perf_counter()
        with Path(path).open("wb") as file:
            file.write(sample)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
    except OSError as error:
        raise UserError(f"{_mib(_SAMPLE_BYTES)} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    speed, part = _SAMPLE_BYTES / seconds, process_bytes(state)
    return Finding(
        f"{speed / 1e6:,.0f} MB/s; this process's part of a checkpoint, at most "
        f"{_mib(part)}, would take {part / speed:,.1f} s",
        None,
        measure=speed,
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"
