"""What the programs share at their border with the shell: arguments, mistakes, exit statuses."""

import argparse
import logging
import os
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from convnext_jax.distributed.joining import exits_at_once
from convnext_jax.errors import (
    RESUME_STATUS,
    ProcessFailedError,
    RunInterruptedError,
    RunStoppedError,
    UserError,
)

COMMAND = "convnext-jax"
# As shells have them: 128 and the number of SIGINT, of SIGPIPE.
INTERRUPTED_STATUS = 130
CLOSED_OUTPUT_STATUS = 141


def make_parser(
    program: str, description: str, examples: str, notes: str = ""
) -> argparse.ArgumentParser:
    """An argument parser whose --help names the command that was typed.

    Args:
      program: the module's name, `train` for `convnext_jax.train`.
      description: a sentence or a few, wrapped here.
      examples: commands, each begun with `python -m convnext_jax.`; a line of words that stands
        before a command, indented less than it, says what it is for.
      notes: a paragraph below the examples, wrapped here.

    Returns:
      The parser, without arguments.
    """
    prefix = f"{COMMAND} " if Path(sys.argv[0]).stem == COMMAND else "python -m convnext_jax."

    def as_typed(text: str) -> str:
        return text.replace("python -m convnext_jax.", prefix)

    epilog = f"examples:\n{textwrap.indent(textwrap.dedent(as_typed(examples)).strip(), '  ')}\n"
    if notes:
        epilog += f"\n{textwrap.fill(as_typed(notes), 79)}\n"
    return argparse.ArgumentParser(
        prog=prefix + program,
        description=textwrap.fill(as_typed(description), 79),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --config; what is given goes to `config_files.load_config`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a Python file with get_config(), or one of the library's own, as configs/tiny.py",
    )


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --weights and --sha256, as every program has them that takes a trained network.

    Args:
      parser: of the program; what is given goes to `convert.pretrained.open_pretrained`.
    """
    parser.add_argument(
        "--weights",
        required=True,
        metavar="W",
        help="what convnext_jax.convert wrote, the workdir of a run, a .pth or .safetensors file, "
        "a URL, or hf://owner/name",
    )
    parser.add_argument("--sha256", help="what a foreign file of weights must hash to")


class _ToStandardError(logging.StreamHandler):
    """Writes to what standard error is at the time, not to what it was when this was made."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def run(program: Callable[[Sequence[str]], object], argv: Sequence[str] | None = None) -> int:
    """Runs a program and turns a user's mistake into one sentence on standard error.

    Args:
      program: takes the arguments after the program's name.
      argv: these arguments; those of the process by default.

    Returns:
      The exit status: 0, 2 after a `UserError`, 75 after a `RunInterruptedError`, 1 after another
      `RunStoppedError` or a `ProcessFailedError`, 130 after Ctrl-C, 141 where
      nobody reads its output any more. Where other processes may wait for this one it does not
      return, but exits.
    """
    log = logging.getLogger("convnext_jax")
    # A handler of its own, since absl, which Orbax brings, has claimed the root logger by now.
    if not log.handlers:
        handler = _ToStandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)
    status = _status(program, sys.argv[1:] if argv is None else argv)
    if exits_at_once():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _status(program: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    try:
        program(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunStoppedError, ProcessFailedError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return RESUME_STATUS if isinstance(error, RunInterruptedError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            # What is left in the buffer must not be tried again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED_OUTPUT_STATUS
        if not exits_at_once():
            raise
        traceback.print_exc()
        return 1
    return 0


def _output_is_closed() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; other pipes may break."""
    try:
        output = sys.stdout.fileno()
    except OSError:
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
