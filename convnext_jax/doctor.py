"""Looks at everything a run needs: python -m convnext_jax.doctor --config F --workdir W.

To be started like the training program, on all hosts and with the same arguments, before it. Each
process looks by itself first. Then process 0 compares what they have found and decides whether they
can compute together, so that a host that is set up otherwise is named and keeps nobody waiting.
Then they do, and time their disks and their decoding. Process 0 prints one table. The exit status
of every process is 0 if no line of it has failed, else 1.
"""

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convnext_jax import cli
from convnext_jax.distributed.joining import add_arguments, joined
from convnext_jax.errors import RunStoppedError, UserError
from convnext_jax.preflight import (
    collective,
    consensus,
    data_set,
    decoding,
    description,
    exchange,
    memory,
    plan_file,
    storage,
    versions,
)
from convnext_jax.preflight.examination import Examination, Missing, Status
from convnext_jax.preflight.report import Report
from convnext_jax.preflight.table import Row, render, rows

_EXAMPLES = """
on every host, before the run is started there
  python -m convnext_jax.doctor --config configs/base.py --workdir runs/base
with what a plan foretells of pace and memory, and all that was found as JSON
  python -m convnext_jax.doctor --config configs/base.py --workdir runs/base \\
    --plan plan.json --json found.json
"""

# The devices of a large slice may take minutes to start.
DEVICE_SECONDS = 600.0
# For all processes to be done with their own checks, several of which may have waited in vain.
GATHER_SECONDS = 900.0
# How long decoding is timed; workers need a while to start besides.
DECODE_SECONDS = 8.0
DECODE_START_SECONDS = 90.0


class Subject(NamedTuple):
    """What the first half of the checks hands to the second; `Missing` where a check failed."""

    versions: dict[str, str]
    devices: Any
    config: Any
    mesh: Any
    source: Any
    eval_source: Any
    state: Any
    wanted: Any
    token: Any


def examine_alone(
    exam: Examination, arguments: argparse.Namespace, overrides: list[str], token: storage.Token
) -> Subject:
    """Runs what no other process has a part in."""
    found = versions.versions()
    check = exam.check
    devices = check("devices", description.devices, found["libtpu"], seconds=DEVICE_SECONDS)
    config = check("config", description.config, arguments.config, overrides)
    mesh = check("mesh", description.mesh, config, needs=[devices])
    check("batch sizes", description.batch_sizes, config, mesh)
    source = check("training set", data_set.train_split, config)
    eval_source = check("evaluation set", data_set.eval_split, config, source)
    steps = check("durations", description.durations, config, source)
    check("augmentation", description.augmentation, config)
    model = check("model", description.model, config, source, mesh)
    state = check("state", description.state, config, model, steps, mesh)
    plan = check("plan", plan_file.images_per_second, arguments.plan, config, needs=[devices])
    name = check("workdir", token.write)
    check("run there", storage.same_config, arguments.workdir, config, needs=[name])
    check("free space", storage.free_space, arguments.workdir, config, state, needs=[name])
    check("open files", memory.open_files)
    return Subject(found, devices, config, mesh, source, eval_source, state, plan, name)


def examine_together(
    exam: Examination, arguments: argparse.Namespace, subject: Subject, decision: dict[str, Any]
) -> None:
    """Runs what all processes do at the same time, as far as process 0 has found them able to.

    Args:
      exam: takes the checks.
      arguments: of the program.
      subject: of this process.
      decision: of process 0, see `consensus.decide`.
    """
    process, processes = exchange.place()
    config, source, state = subject.config, subject.source, subject.state
    check = exam.check
    if processes > 1:
        token = decision["token"] or Missing("workdir")
        check("one workdir", storage.same_directory, arguments.workdir, token)
    here = decision["hosts"].count(decision["hosts"][process])
    check("host memory", memory.host_memory, config, subject.eval_source, state, here)
    check("shared memory", memory.shared_memory, config, subject.eval_source, state, here)
    check("write speed", storage.write_speed, arguments.workdir, state, needs=[subject.token])
    check(
        "decoding",
        decoding.pace,
        config,
        source,
        subject.wanted,
        DECODE_SECONDS,
        seconds=DECODE_START_SECONDS + DECODE_SECONDS,
    )
    if decision["all-reduce"]:
        exam.skip("all-reduce", decision["all-reduce"])
    else:
        check("all-reduce", collective.all_reduce)
    if decision["initial weights"]:
        exam.skip("initial weights", decision["initial weights"])
    else:
        check("initial weights", description.initial_weights, config, state)


def facts(subject: Subject) -> dict[str, Any]:
    """What of a process's findings the others' are held against; None for what it has not."""

    def known(value: Any) -> Any:
        return None if isinstance(value, Missing) else value

    config, source, eval_source = map(known, (subject.config, subject.source, subject.eval_source))
    data = {"training set": source, "evaluation set": eval_source}
    return {
        "versions": subject.versions,
        "devices": known(subject.devices),
        "config": config and config.to_dict(),
        "data": source and {role: split.identity for role, split in data.items() if split},
        "state": known(subject.state) is not None,
        "token": known(subject.token),
    }


class Result(NamedTuple):
    """What the examination has come to.

    Attributes:
      table: its lines; empty on all processes but the first.
      reports: of all processes, None for one that did not report; empty likewise.
      failed: names of the lines that have failed, on every process.
      hanging: names of the checks that this process has left behind, still waiting.
    """

    table: list[Row]
    reports: list[Report | None]
    failed: list[str]
    hanging: list[str]


def examine(arguments: argparse.Namespace, overrides: list[str]) -> Result:
    """Runs all checks.

    Args:
      arguments: of the program.
      overrides: of the config.

    Raises:
      RunStoppedError: if process 0 is not heard of any more.
    """
    exam, token, host = Examination(), storage.Token(arguments.workdir), socket.gethostname()
    try:
        subject = examine_alone(exam, arguments, overrides, token)
        known = facts(subject)
        reports = _gathered("alone", Report(host, exam.checks, known))
        decision = _sent("decision", consensus.decide(reports) if reports else {})
        known["clock"] = time.time() - decision["sent"]
        examine_together(exam, arguments, subject, decision)
        if exchange.place()[0] != 0:
            token.remove()
        reports = _gathered("together", Report(host, exam.checks, known))
        table = tabulate(reports) if reports else []
        failed = [row.name for row in table if row.status is Status.FAILED]
        token.remove()
        verdict = _sent("verdict", {"failed": failed})
    finally:
        token.remove()
        token.remove_directories()
    return Result(table, reports, verdict["failed"], exam.hanging)


def tabulate(reports: list[Report | None]) -> list[Row]:
    """All lines of the table, from all processes' reports."""
    compared = [*consensus.late(reports), *consensus.compare(reports), *consensus.clocks(reports)]
    own = [report.checks if report else [] for report in reports]
    alone = [Row(c.name, c.status, ((c.detail, c.remedy),)) for c in compared]
    return [*alone, *rows(own, consensus.hosts_of(reports))]


def _gathered(name: str, report: Report) -> list[Report | None]:
    texts = exchange.gather(name, report.to_json(), GATHER_SECONDS)
    return [None if text is None else Report.from_json(text) for text in texts]


def _sent(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """What process 0 gives, on every process, with the time at which it was "sent"."""
    own = json.dumps({**value, "sent": time.time()})
    # Process 0 itself may have to wait for the last of the others.
    text = exchange.broadcast(name, own, 2 * GATHER_SECONDS)
    if text is None:
        raise RunStoppedError("process 0 has not answered; see what it prints, and its host")
    return dict(json.loads(text))


def write_json(path: Path, result: Result) -> None:
    """Writes all that was found, of each process."""
    report = {
        "failed": result.failed,
        "table": [dataclasses.asdict(row) for row in result.table],
        "processes": [r and dataclasses.asdict(r) for r in result.reports],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "doctor",
        "Look at all that a run needs, on all hosts, before it is started.",
        _EXAMPLES,
        "Give it the arguments of the training program: any field of the config is set by "
        "--config.FIELD=VALUE.",
    )
    cli.add_config_argument(parser)
    parser.add_argument("--workdir", required=True, help="the run's; nothing is left in it")
    parser.add_argument("--plan", type=Path, help="what convnext_jax.plan --json wrote")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    parser.add_argument("--overwrite", action="store_true", help="replace the --json file")
    add_arguments(parser)
    arguments, overrides = parser.parse_known_args(argv)
    with joined(arguments):
        writes = arguments.json is not None and exchange.place()[0] == 0
        if writes and arguments.json.exists() and not arguments.overwrite:
            raise UserError(f"{arguments.json} exists; give another --json, or --overwrite")
        if writes and not arguments.json.parent.is_dir():
            raise UserError(f"--json {arguments.json}: there is no such directory")
        result = examine(arguments, overrides)
        if result.table:
            print(render(result.table))
        if writes:
            write_json(arguments.json, result)
    if result.hanging:
        # Whatever they wait for, the interpreter would wait for it too.
        sys.stdout.flush()
        print(f"failed: {', '.join(result.failed)}", file=sys.stderr, flush=True)
        os._exit(1)
    if result.failed:
        raise RunStoppedError(f"not ready to train: {', '.join(result.failed)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
