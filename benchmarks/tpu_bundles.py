"""Static cycles and memory traffic of the Pallas kernels in a program compiled for a TPU.

The compiler estimates no cycles for a Pallas kernel, but can write down its code: VLIW bundles, of
which the core issues about one a cycle. A kernel's code is the loop over its grid. Of a grid step
some bundles always run, others under a condition (`pl.when`); the caller says how often those run.

Waiting for memory is not in the count, so a kernel takes no less than the larger of its static
cycles and the time that its bytes take.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.hlo_text import parse

# Guarded parts shorter than this are the pipeline's: they start and await copies of blocks.
_SHORTEST_PART = 64

_BUNDLE = re.compile(r"\s*(0x)?[0-9a-f]+\s+(\w\w)?\s*:")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_TARGET = re.compile(r"Start/End empty region (\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_VMEM = re.compile(r" = \w+\[[\d,]*\]\{[^}]*S\(1\)\}")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The bundles of one grid step of a kernel.

    Attributes:
      always: how many run in every step.
      parts: how many each guarded part has, in the order of the kernel's code.
      loops: trip counts of the loops in the code that a constant ends, in the order of their ends;
        the last is the grid's, which runs on for the steps that fill and empty its pipeline.
    """

    always: int
    parts: tuple[int, ...]
    loops: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MosaicKernel:
    """One call of a Pallas kernel in a compiled program.

    Attributes:
      name: of the instruction; `name` of the `pallas_call`, with a number behind it or none.
      schedule: of a grid step.
      runs: how often the call runs in the program.
      cycles: static, of one run.
      hbm_bytes: of its operands and results that lie in HBM, each counted once.
    """

    name: str
    schedule: Schedule
    runs: float
    cycles: int
    hbm_bytes: int


# Grid steps, and how often each guarded part runs in all of them.
Counts = tuple[int, Sequence[int]]


def dump_bundles(folder: Path) -> None:
    """Has the compiler write its code into a folder; call it before libtpu is loaded."""
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def mosaic_kernels(
    text: str, folder: Path, counts: Callable[[str, tuple[int, ...]], Counts]
) -> list[MosaicKernel]:
    """Counts what each call of a Pallas kernel takes.

    Args:
      text: of `compiled.as_text()`.
      folder: from `dump_bundles`, with the files of this program alone: the names of another's
        kernels may be the same.
      counts: from a kernel's name, without its number, and its first result's shape.

    Returns:
      The calls in the order of the program.

    Raises:
      ValueError: if a kernel has no schedule, or not as many guarded parts as `counts` says.
    """
    module = parse(text)
    instructions = {
        one.name: (one, computation)
        for computation in module.computations.values()
        for one in computation.values()
    }
    lines = {
        line.split(" = ")[0].strip().removeprefix("ROOT ").removeprefix("%"): line
        for line in text.splitlines()
        if " = " in line
    }
    files = {match[1]: path for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    found = []
    for operation in operations(text):
        one, computation = instructions[operation.name]
        if one.attributes.get("custom_call_target") != "tpu_custom_call":
            continue
        if one.name not in files:
            raise ValueError(f"{folder} holds no bundles of {one.name}: was its cache at work?")
        schedule = read_schedule(files[one.name].read_text())
        kernel = re.sub(r"\.\d+$", "", one.name)
        shape = re.search(r"= \(?\w+\[([\d,]*)\]", lines[one.name])
        steps, times = counts(kernel, tuple(int(n) for n in shape[1].split(",")))
        if len(times) != len(schedule.parts):
            raise ValueError(
                f"{one.name} has guarded parts of {schedule.parts} bundles, but {len(times)} counts"
            )
        guarded = sum(n * m for n, m in zip(schedule.parts, times, strict=True))
        arrays = [one.name, *(name for name in one.operands if name in computation)]
        hbm = sum(_hbm_bytes(lines[name], computation[name].result_bytes) for name in arrays)
        cycles = schedule.always * steps + guarded
        found.append(MosaicKernel(one.name, schedule, operation.runs, cycles, hbm))
    return found


def read_schedule(text: str) -> Schedule:
    """Counts the bundles of a kernel, from the text of its "final_bundles" file."""
    bundles, branches, ends, loops = 0, [], {}, []
    for line in text.splitlines():
        if not _BUNDLE.match(line):
            continue
        if match := _BRANCH.search(line):
            branches.append((bundles, match[1]))
        for match in _TARGET.finditer(line):
            ends[match[1]] = bundles
        if match := _EXIT.search(line):
            loops.append(int(match[1]))
        bundles += 1
    spans = [(start, ends[region]) for start, region in branches if region in ends]
    spans = [(a, b) for a, b in spans if b - a >= _SHORTEST_PART]
    # Of nested ones the innermost: what encloses the kernel's own parts is the pipeline's.
    parts = [(a, b) for a, b in spans if not any(a < c and d <= b for c, d in spans)]
    lengths = tuple(b - a for a, b in parts)
    return Schedule(bundles - sum(lengths), lengths, tuple(loops))


def _hbm_bytes(line: str, size: int) -> int:
    """Those of an instruction's result, unless the compiler keeps it in VMEM."""
    return 0 if _VMEM.search(line) else size
