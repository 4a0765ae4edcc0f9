"""The notebooks: what is committed was run from top to bottom, and runs from top to bottom."""

import base64
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 300_000  # bytes, pictures included

# Whatever a home, a temporary folder or an installed package is called on somebody's machine.
MACHINE_PATH = re.compile(
    r"(/(home|root|Users|tmp|work|content|usr|opt|var|mnt)\b/?|site-packages|[A-Z]:\\\\)"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def printed(output):
    """What a reader sees of an output as text: of a stream, an error, or a result."""
    if output["output_type"] == "error":
        return "\n".join(output["traceback"])
    text = output["text"] if "text" in output else output["data"].get("text/plain", "")
    return "".join(text)


def complaints(notebook):
    """Errors, and all that went to standard error: the notebooks print nothing there."""
    return [
        printed(output)
        for output in outputs(notebook)
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


def pictures(notebook):
    """Width and height of every PNG among the outputs."""
    found = []
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            png = base64.b64decode("".join(output["data"]["image/png"]))
            assert png.startswith(b"\x89PNG\r\n\x1a\n")
            found.append(struct.unpack(">II", png[16:24]))
    return found


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_six():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i}_" for i in range(1, 7)]


@each_notebook
def test_it_was_run_from_top_to_bottom(path):
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@each_notebook
def test_its_outputs_hold_no_complaint_and_no_path_of_a_machine(path):
    notebook = read(path)
    assert not complaints(notebook)
    assert not [text for text in map(printed, outputs(notebook)) if MACHINE_PATH.search(text)]


@each_notebook
def test_it_has_pictures_and_is_small(path):
    found = pictures(read(path))
    assert found
    assert all(width >= 300 and height >= 100 for width, height in found)
    assert path.stat().st_size <= LARGEST


@each_notebook
def test_it_holds_neither_metadata_nor_addresses(path):
    notebook = read(path)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    # Of a last expression that nobody wanted to see; a semicolon behind it hides it.
    assert not [text for text in map(printed, outputs(notebook)) if " at 0x" in text]


@each_notebook
def test_it_installs_the_library_only_where_it_is_missing(path):
    source = "".join(code_cells(read(path))[0]["source"])
    assert 'if importlib.util.find_spec("convnext_jax") is None:' in source
    commands = [line for line in source.splitlines() if "%pip" in line]
    assert [line.strip() for line in commands] == ["%pip install -q {checkout}"]
    assert all(line.startswith("    ") for line in commands)


@each_notebook
def test_it_is_a_notebook_of_the_current_format(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)


@each_notebook
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda c: c[0])
def test_its_cells_pass_ruff(path, command):
    pytest.importorskip("ruff")
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(path)],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ({"output_type": "stream", "name": "stdout", "text": ["fine\n"]}, []),
        ({"output_type": "stream", "name": "stderr", "text": ["W: odd\n"]}, ["W: odd\n"]),
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": ["a", "b"]}, ["a\nb"]),
    ],
)
def test_complaints_are_found(output, found):
    cells = [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": [output]}]
    assert complaints({"cells": cells}) == found


@pytest.mark.parametrize(
    "text", ["wrote /tmp/x", "/home/me/runs", r"C:\\x", "/usr/lib/site-packages"]
)
def test_paths_of_machines_are_found(text):
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search("runs/3_fine_tune/own_run, 32 images/s, and/or")


@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom(path, tmp_path):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)

    # As a reader's own, without the eight devices that the other tests ask for; but compiled
    # quickly, since small networks spend their time on that.
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    }
    notebook = execute.execute(path, tmp_path, environment)
    assert not complaints(notebook)
    assert len(pictures(notebook)) == len(pictures(read(path)))
