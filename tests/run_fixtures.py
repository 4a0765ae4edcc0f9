"""A pytest plugin: runs of the training program that several tests look at.

Compilation is what such runs spend their time on, so few programs are compiled, and all processes
of a test session share them.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import pytest
from runs import Run, command


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def _session_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def quick(_session_directory):
    """Lets programs started by tests compile as conftest.py has it here, and share its cache."""
    environment = {
        "CONVNEXT_JAX_DATA_DIR": str(_session_directory / "data"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A program traced under other rules would be another program.
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONWARNINGS": "error",
        "PYTHONUNBUFFERED": "1",
    }
    with _environment(environment):
        yield


@pytest.fixture(scope="module")
def finished(quick, _session_directory):
    """The tiny config's run from its first step to its last, by the command that a person types.

    Made once a session. Tests that write into the workdir work on a copy; see `copy_of`.
    """
    workdir = _session_directory / "finished"
    printed = _session_directory / "finished.out", _session_directory / "finished.err"
    if not workdir.exists():
        done = subprocess.run(command(workdir), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        for path, text in zip(printed, (done.stdout, done.stderr), strict=True):
            path.write_text(text)
    return Run(workdir, *(path.read_text() for path in printed))


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    """A copy of the finished run's workdir, to go on in."""
    return Path(shutil.copytree(finished.workdir, tmp_path / "copy"))
