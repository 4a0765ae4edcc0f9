"""All programs under one command: convnext-jax PROGRAM, or python -m convnext_jax PROGRAM."""

import importlib
import sys
from collections.abc import Sequence

from convnext_jax.version import __version__

PROGRAMS = {
    "train": "train a network, or resume a run",
    "evaluate": "measure a network's accuracy on a data set",
    "predict": "name what is on images, or write their features",
    "convert": "read published weights, or write them for others",
    "export": "write a network as StableHLO or ONNX",
    "plan": "memory, time and cost of a run on TPUs, without a TPU",
    "doctor": "look at all that a run needs, before it is started",
    "configs": "list the library's configs, or print one",
    "show_batch": "a contact sheet of what a network is trained on",
    "roadmap": "the steps from ResNet to ConvNeXt",
    "compare": "networks side by side: size, accuracy, throughput",
}

_USAGE = f"""usage: convnext-jax PROGRAM [ARGUMENT ...]

ConvNeXt in JAX and Flax, version {__version__}. Programs:

{chr(10).join(f"  {name:<12}{what}" for name, what in PROGRAMS.items())}

Each tells its arguments by --help, and runs as python -m convnext_jax.PROGRAM, too.

examples:
  convnext-jax train --config configs/digits.py --workdir runs/digits
  convnext-jax predict --weights runs/digits IMAGE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names.

    Args:
      argv: the arguments after the command's name; those of the process by default.

    Returns:
      The exit status, as `cli.run` gives it; 2 for a program that does not exist.
    """
    name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    program = name.replace("-", "_")
    if program not in PROGRAMS:
        print(
            f"error: there is no program {name!r}; the programs are {', '.join(PROGRAMS)}",
            file=sys.stderr,
        )
        return 2
    # One only, since each brings what it needs, and --help should come at once.
    from convnext_jax import cli

    module = "convert.__main__" if program == "convert" else program
    return cli.run(importlib.import_module(f"convnext_jax.{module}").main, arguments)


if __name__ == "__main__":
    sys.exit(main())
