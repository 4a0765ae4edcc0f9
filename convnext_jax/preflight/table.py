"""The processes' findings as one table: a line for each check, the worst process's word first."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from convnext_jax.preflight.examination import Check, Status

SIGNS = {Status.OK: "✓", Status.SKIPPED: "–", Status.WARNING: "!", Status.FAILED: "✗"}
_SEVERITY = [Status.OK, Status.SKIPPED, Status.WARNING, Status.FAILED]
_HOSTS_SHOWN = 4
_GROUPS_SHOWN = 3
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: of the check.
      status: the worst that any process found.
      texts: what they say, each with its remedy, or "".
    """

    name: str
    status: Status
    texts: tuple[tuple[str, str], ...]


def rows(checks: Sequence[Sequence[Check]], hosts: Sequence[str]) -> list[Row]:
    """Merges what the processes found.

    Args:
      checks: of each process.
      hosts: the name of each process's host.

    Returns:
      A row for each name, in the order of their first mention.
    """
    by_name: dict[str, dict[int, Check]] = {}
    for process, own in enumerate(checks):
        for check in own:
            by_name.setdefault(check.name, {})[process] = check
    return [_row(name, found, hosts) for name, found in by_name.items()]


def render(table: Sequence[Row]) -> str:
    """The table as text of at most 100 columns, words that are longer left whole."""
    width = max(len(row.name) for row in table)
    lines = []
    for row in table:
        first = f"{SIGNS[row.status]} {row.name:<{width}}  "
        for detail, remedy in row.texts:
            lines += _wrapped(detail, first)
            first = " " * len(first)
            if remedy:
                lines += _wrapped(remedy, first + "→ ")
    return "\n".join(lines)


def named(processes: Sequence[int], hosts: Sequence[str]) -> str:
    """Names processes and their hosts: "processes 1-3, 6 (host-b, host-c)"."""
    runs: list[list[int]] = []
    for process in processes:
        if runs and process == runs[-1][-1] + 1:
            runs[-1].append(process)
        else:
            runs.append([process])
    numbers = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    where = list(dict.fromkeys(hosts[process] for process in processes))
    shown = ", ".join(where[:_HOSTS_SHOWN]) + (", …" if len(where) > _HOSTS_SHOWN else "")
    return f"process{'es' if len(processes) > 1 else ''} {numbers} ({shown})"


def _row(name: str, found: dict[int, Check], hosts: Sequence[str]) -> Row:
    status = max((check.status for check in found.values()), key=_SEVERITY.index)
    worst = {process: check for process, check in found.items() if check.status is status}
    alike: dict[tuple[str, str], list[int]] = {}
    for process, check in worst.items():
        alike.setdefault((check.detail, check.remedy), []).append(process)
    groups = list(alike.items())
    measured = all(check.measure is not None for check in worst.values())
    if measured:
        groups.sort(key=lambda group: min(worst[p].measure or 0.0 for p in group[1]))
    if status is Status.OK:
        # Of many that are well, one speaks for all: the slowest, or the first.
        groups, left = groups[:1], 0
    else:
        left = sum(len(processes) for _, processes in groups[_GROUPS_SHOWN:])
        groups = groups[:_GROUPS_SHOWN]
    texts = []
    for (detail, remedy), processes in groups:
        everywhere = len(processes) == len(hosts)
        if len(hosts) > 1 and not everywhere:
            worst_of = "worst on " if status is Status.OK and measured else ""
            detail = f"{worst_of}{named(processes, hosts)}: {detail}"
        texts.append((detail, remedy))
    if left:
        texts.append((f"and {left} processes more; --json tells of each", ""))
    return Row(name, status, tuple(texts))


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
