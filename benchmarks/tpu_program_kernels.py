"""Which of this library's Pallas kernels a compiled program runs, and their static cycles."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from convnext_jax.analysis.hlo_text import parse


def kernels_in(text, program):
    """How often each Pallas kernel runs, by its name and its images' shape."""
    instructions = {
        one.name: one for many in parse(text).computations.values() for one in many.values()
    }
    counts = {}
    for operation in program:
        one = instructions[operation.name]
        if one.attributes.get("custom_call_target") == "tpu_custom_call":
            name = one.name.split(".")[0]
            key = f"{name} {_shape_of_images(text, one.name)}"
            counts[key] = counts.get(key, 0) + operation.runs
    return counts


def _shape_of_images(text, name):
    """PIXELSxCHANNELSxIMAGES of the first such array in an instruction's line."""
    (line,) = (line for line in text.splitlines() if re.match(rf"\s+(ROOT )?%?{name} = ", line))
    return "x".join(re.search(r"bf16\[(\d+),(\d+),(\d+)\]", line).groups())


def static_cycles(kernels, results):
    """Cycles of all runs of kernels on a TPU v5e; those of a single run are kept.

    Args:
      kernels: from `kernels_in`.
      results: `Results`, to keep them in.
    """
    missing = [key for key in kernels if results.get(key) is None]
    for key, cycles in (_kernel_cycles(missing) if missing else {}).items():
        results.put(key, cycles)
    return sum(results.get(key) * runs for key, runs in kernels.items())


def _kernel_cycles(keys):
    # In a process of its own, which has the compiler write down its code.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("tpu_kernels.py")), folder, *keys]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
