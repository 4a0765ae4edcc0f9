"""ConvNeXt-T on the CPU, float32: this library, plain Flax, Keras on JAX, and timm, in one run.

    pip install -e '.[parity]' keras
    python benchmarks/cpu.py

Inference and the whole training step (forward pass, cross entropy, backward pass, AdamW, stochastic
depth .1) at batches of 8 and 1. Each contender is a process of its own with all cores; they run one
call each in turn, and a figure is the median of the rounds. The ratio is this library's pace over
the contender's of the same rounds, so what else the machine does touches both. "plain Flax" is the
same network of Flax's own layers (`plain_flax.py`). This library's two are compiled with the
options of `predict` and `train` (`convnext_jax/compiler_options.py`); nobody else's have options.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from cpu_contenders import CONTENDERS

from convnext_jax.tables import markdown_table

SETTINGS = [(mode, batch) for mode in ("inference", "training") for batch in (8, 1)]


class Contender:
    """A process that makes a pass when told to."""

    def __init__(self, name, mode, batch_size, more):
        """Starts it and waits until it has compiled."""
        program = Path(__file__).with_name("cpu_contenders.py")
        command = [sys.executable, program, name, mode, f"--batch_size={batch_size}", *more]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        self.versions = self._answer()["versions"]

    def seconds(self):
        """Of one pass."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith("{") or line[0].isdigit():
                return json.loads(line)
        raise SystemExit(f"a contender ended with status {self._process.wait()}")


def measure(mode, batch_size, names, rounds, more):
    """Seconds of each round by contender, and all versions."""
    contenders = {name: Contender(name, mode, batch_size, more) for name in names}
    versions = {}
    for one in contenders.values():
        versions |= one.versions
    seconds = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, one in contenders.items():
            took = one.seconds()
            if turn:  # the first warms the caches
                seconds[name].append(took)
    for one in contenders.values():
        one.close()
    return seconds, versions


def rows_of(mode, batch_size, seconds):
    """Of the table, one a contender."""
    ours = seconds["convnext_jax"]
    for name, times in seconds.items():
        ratios = [other / own for own, other in zip(ours, times, strict=True)]
        yield [
            f"{mode}, {batch_size} image{'s' * (batch_size != 1)}",
            name,
            f"{1e3 * statistics.median(times):,.0f} ms",
            f"{1e3 * min(times):,.0f} ms",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        ]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--settings", nargs="+", default=[f"{m}-{b}" for m, b in SETTINGS])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--overrides", default="{}", help='JSON, {"depths": […], "dims": […]}')
    arguments = parser.parse_args()
    names = ["convnext_jax", *(n for n in arguments.contenders if n != "convnext_jax")]
    more = [f"--image_size={arguments.image_size}", f"--overrides={arguments.overrides}"]
    rows, versions = [], {}
    for setting in arguments.settings:
        mode, batch_size = setting.split("-")
        seconds, found = measure(mode, int(batch_size), names, arguments.rounds, more)
        rows += rows_of(mode, int(batch_size), seconds)
        print(*rows[-len(names) :], sep="\n", file=sys.stderr, flush=True)
        versions |= found
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    print(f"{os.cpu_count()} cores, {arguments.rounds} rounds\n")
    titles = ["", "", "median", "least", "this library's pace ÷ its"]
    print(markdown_table(titles, rows, left=(0, 1)))


if __name__ == "__main__":
    main()
