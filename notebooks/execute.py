"""Runs notebooks from top to bottom and keeps what they show.

    python notebooks/execute.py [FILE ...]

Needs `pip install -e '.[notebooks]'`. Of a file only the outputs change: counts start at 1, and
times and the kernel's version are left out.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, folder: Path, environment: Mapping[str, str]) -> nbformat.NotebookNode:
    """Runs a notebook in a fresh kernel of this interpreter's environment.

    Args:
      path: of the .ipynb, which stays as it is.
      folder: the kernel's working directory.
      environment: the kernel's variables.

    Returns:
      The notebook with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=dict(environment))
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_slowness(output)]
    return notebook


def _is_slowness(output: nbformat.NotebookNode) -> bool:
    """Whether it is XLA's alarm at a compilation of two minutes: it tells of a busy machine."""
    return output.get("name") == "stderr" and "slow_operation_alarm" in output.text


def main(argv: Sequence[str]) -> None:
    """Runs the files named, or all in this folder, and replaces each by its executed self."""
    here = Path(__file__).parent
    for path in [Path(name) for name in argv] or sorted(here.glob("*.ipynb")):
        started = time.monotonic()
        notebook = execute(path, here, os.environ)
        draft = path.with_name(path.name + ".tmp")
        nbformat.write(notebook, draft)
        draft.replace(path)
        print(f"{path}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
