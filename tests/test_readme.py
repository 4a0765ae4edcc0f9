"""The README: its commands and programs run as they are printed there, its tables counted again."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from PIL import Image
from pod import Pod

from convnext_jax.__main__ import PROGRAMS
from convnext_jax.analysis.macs import count_macs, count_parameters
from convnext_jax.analysis.published import PUBLISHED_TOP1, PUBLISHED_TOP1_FROM_22K
from convnext_jax.config_files import library_configs
from convnext_jax.convert.mapping import from_params
from convnext_jax.models import ConvNeXt, create_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What stands in for ConvNeXt-T, whose name the file of weights has in the README.
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
_QUICK = [
    *(f"--config.model.overrides.{name}={value}" for name, value in SMALL.items()),
    "--config.total=2 steps",
    "--config.optim.warmup=0 steps",
    "--config.batch_size=8",
    "--config.eval_batch_size=8",
    "--config.mix.group_size=2",
    "--config.data.image_size=64",
    "--config.data.workers=0",
]
_DATA = "--config.data.data_dir=tensorflow_datasets"
# What tiny.py above has been run with already, and takes longest to compile.
_PLAIN = ("--config.augment.policy=", "--config.augment.erasing_prob=0.0")
# Behind a command of the README, by how it begins: so that two cores end it within a minute.
MADE_SMALL = {
    "train --config configs/finetune_folder.py": _QUICK,
    "train --config configs/tiny.py": _QUICK,
    "train --config configs/base.py": [*_QUICK, _DATA, *_PLAIN],
    "doctor --config configs/base.py": [*_QUICK, _DATA, *_PLAIN],
    "show_batch --config configs/tiny.py": [*_QUICK, _DATA, "--images=8"],
    "compare": ["--models", "convnext_atto", "--batch_size=1", "--image_size=32", "--rounds=1"],
}
ON_EVERY_HOST = ("doctor --config configs/base.py", "train --config configs/base.py")


def commands(text):
    """The commands of a shell block: continuation lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [line for line in lines if line.strip() and not line.startswith("#")]
    return [part for line in found for part in re.split(r"\s+&&\s+", line)]


SHELL = [command for kind, text in BLOCKS if kind == "sh" for command in commands(text)]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
# In the order of the page, since one goes on with what another wrote.
OWN = [command for command in SHELL if "-m convnext_jax." in command]


def arguments_of(command):
    """What follows `python -m convnext_jax.`, as a shell splits it."""
    return shlex.split(command, comments=True)[2:]


def test_a_section_for_each_thing_that_a_newcomer_wants():
    programs = {arguments_of(command)[0].removeprefix("convnext_jax.") for command in OWN}
    assert programs >= {"train", "convert", "evaluate", "predict", "plan", "doctor"}
    assert len(PYTHON) == 2
    assert sum("init_from" in command for command in OWN) == 1


def test_every_other_command_is_one_of_installation_or_of_the_tests():
    rest = [command for command in SHELL if command not in OWN]
    project = (ROOT / "pyproject.toml").read_text()
    for command in rest:
        extra = re.fullmatch(r"pip install (?:-e \.|-e '\.\[(\w+)\]')", command)
        if extra is None:
            assert command in (
                "git clone <this repository>",
                "cd convnext_jax",
                "python -m pytest -n auto",
            )
        elif extra[1]:
            assert re.search(rf"^{extra[1]} = \[", project, re.MULTILINE), command


def test_every_file_and_program_that_is_named_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tests|docs|benchmarks|notebooks)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    for program in re.findall(r"(?:python -m convnext_jax\.|convnext-jax )([a-z_]+)", README):
        assert program in PROGRAMS, program
    for names, extra in re.findall(r"^\| `([\w{},…]+)\.py(?:`|:)|(\w+\.py)", README, re.MULTILINE):
        name = names or Path(extra).stem
        if not re.search(r"[{},…]", name) and f"configs/{name}.py" in README:
            assert name in library_configs() or name == "my_config", name


def test_the_table_of_models_is_what_the_networks_count():
    rows = re.findall(r"^\| `(convnext\w+)` \|(.*)\|$", README, re.MULTILINE)
    assert len(rows) == 16
    for name, row in rows:
        parameters, macs, top1, from_22k, weights = (cell.strip() for cell in row.split("|"))
        model = create_model(name)
        assert parameters == f"{count_parameters(model, 224):,}"
        assert macs == f"{count_macs(model, 224) / 1e9:.3f} G"
        assert top1 == str(PUBLISHED_TOP1.get(name, "–"))
        pair = PUBLISHED_TOP1_FROM_22K.get(name)
        assert from_22k == ("–" if pair is None else " / ".join(str(x or "–") for x in pair))
        assert name in weights


def test_accuracies_from_22k_are_those_that_the_configs_expect():
    for name, pair in PUBLISHED_TOP1_FROM_22K.items():
        if name.startswith("convnext_"):
            config = library_configs()[f"{name.removeprefix('convnext_')}_22k_ft_1k"].read_text()
            assert all(f"{top1} %" in config or str(top1) in config for top1 in pair), name


def _photograph(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((80, 60)).save(path, "JPEG")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A directory with what the README's commands take up: weights, photographs, a data set."""
    place = tmp_path_factory.mktemp("newcomer")
    model = ConvNeXt(num_classes=1000, **SMALL)
    params = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    tensors = {
        name: torch_files.tensor(str(index), np.asarray(array))
        for index, (name, array) in enumerate(from_params(params, model, "official").items())
    }
    torch_files.write_zip(place / "convnext_tiny_1k_224_ema.pth", {"model": tensors})
    rng = np.random.default_rng(0)
    for index in range(3):
        _photograph(place / "photographs" / f"{index}.jpg", rng)
    for index in range(40):
        _photograph(place / "photos" / ("cat", "dog")[index % 2] / f"{index}.jpg", rng)
        _photograph(place / "challenge" / f"n0144{(3537, 4764)[0]}_{index}.JPEG", rng)
    script = [sys.executable, ROOT / "tests" / "data" / "make_imagenet_like.py"]
    paths = [f"--images={place / 'challenge'}", f"--data_dir={place / 'tensorflow_datasets'}"]
    subprocess.run([*script, *paths], check=True, capture_output=True, cwd=ROOT)
    return place


# Compilation is what commands on small networks spend their time on.
_QUICK_TO_COMPILE = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def _run(line, place, **environment):
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    begun = time.perf_counter()
    done = subprocess.run(
        line,
        cwd=place,
        env={**quiet, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
        shell=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(f"{time.perf_counter() - begun:5.1f} s  {line[:90]}\n         {last[:90]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _made_small(command):
    wanted = " ".join(arguments_of(command)).removeprefix("convnext_jax.")
    return [a for begin, more in MADE_SMALL.items() if wanted.startswith(begin) for a in more]


@pytest.mark.slow
def test_the_commands_run_in_the_order_of_the_page(newcomer):
    printed = {}
    for command in OWN:
        words = arguments_of(command)
        if "configs/digits.py" in words or "convnext_jax.plan" in words:
            continue  # tests/test_digits.py and test_the_plan_runs have these
        wanted = " ".join(words).removeprefix("convnext_jax.")
        if wanted.startswith(ON_EVERY_HOST):
            program = [sys.executable, "-m", *words, *_made_small(command)]
            environment = {"PYTHONPATH": str(ROOT), **_QUICK_TO_COMPILE}
            here = os.getcwd()
            os.chdir(newcomer)
            try:
                hosts = Pod(None, program=program, processes=2, devices=2, environment=environment)
            finally:
                os.chdir(here)
            with hosts:
                assert hosts.wait(400) == [0, 0], hosts.printed()
                printed[command] = hosts.out(0)
                print(f"2 hosts  {command}\n         {hosts.out(0).strip().splitlines()[-1][:90]}")
        else:
            line = shlex.join(["python", "-m", *words, *_made_small(command)])
            printed[command] = _run(line, newcomer, **_QUICK_TO_COMPILE)
    by_program = {}
    for command, text in printed.items():
        program = arguments_of(command)[0].removeprefix("convnext_jax.")
        by_program.setdefault(program, []).append(text)
    assert "depths (1, 1, 1, 1), dims (8, 8, 16, 16)" in by_program["convert"][0]
    assert re.search(r"\b8\b.*images|top-1", by_program["evaluate"][0])
    assert "photographs/0.jpg" in by_program["predict"][0]
    assert re.search(r"\d\.\d\d%  [01]  (cat|dog)", by_program["predict"][1])
    assert (newcomer / "tiny.safetensors").is_file()
    assert (newcomer / "tiny.stablehlo").is_file()
    assert (newcomer / "roadmap_t.svg").is_file()
    assert "2 of 2" in by_program["train"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_programs_run(number, newcomer):
    """Each as it is printed, with assertions made of what its comments say of shapes and types."""
    lines = []
    for line in PYTHON[number].splitlines():
        lines.append(line)
        comment = re.fullmatch(r"(\w+) = .*  # \(([\d, ]+)\)(?: (\w+))?", line)
        if comment:
            lines.append(f"assert {comment[1]}.shape == ({comment[2]},), {comment[1]}.shape")
            if comment[3]:
                lines.append(f"assert {comment[1]}.dtype == {comment[3]!r}")
        if strides := re.fullmatch(r"maps = .*  # strides ([\d, ]+)", line):
            lines.append(f"assert [224 // m.shape[1] for m in maps] == [{strides[1]}]")
    file = newcomer / f"program_{number}.py"
    file.write_text("\n".join(lines))
    _run(f"python {file.name}", newcomer)
    if number == 0:
        assert sum(line.startswith("assert") for line in lines) >= 5


@pytest.mark.tpu_compiler
def test_the_plan_runs(tmp_path):
    pytest.importorskip("libtpu")
    (command,) = (c for c in OWN if "convnext_jax.plan" in c)
    small = [f"--config.model.overrides.{name}={value}" for name, value in SMALL.items()]
    words = [*arguments_of(command), *small, "--config.data.image_size=64"]
    assert "fits" in _run(shlex.join(["python", "-m", *words]), tmp_path)
