"""What all processes of a run must have alike, compared."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from convnext_jax.preflight.examination import Check, Status
from convnext_jax.preflight.table import named

_SHOWN = 6


def agreement(
    name: str,
    values: Sequence[Mapping[str, Any] | None],
    hosts: Sequence[str],
    *,
    detail: str,
    remedy: str,
    free: Collection[str] = (),
) -> Check:
    """Compares one mapping of each process with the others', key by key.

    Args:
      name: of the line.
      values: by process; None for a process that has none.
      hosts: by process, for the message.
      detail: of the line if all is alike.
      remedy: if not.
      free: keys whose difference is worth a warning only.

    Returns:
      The line, which names the processes that differ from most of the others, and how.
    """
    have = {process: flat(value) for process, value in enumerate(values) if value is not None}
    if not have:
        return Check(name, Status.SKIPPED, "not compared, since no process could tell")
    differences, worst = [], Status.OK
    for key in dict.fromkeys(key for value in have.values() for key in value):
        found = {process: value.get(key, "nothing") for process, value in have.items()}
        # Of equally frequent ones that of the lowest process.
        usual = collections.Counter(map(str, found.values())).most_common(1)[0][0]
        others: dict[str, list[int]] = {}
        for process, value in found.items():
            if str(value) != usual:
                others.setdefault(str(value), []).append(process)
        for value, processes in others.items():
            differences.append(f"{key} is {value} on {named(processes, hosts)}, else {usual}")
            if worst is not Status.FAILED:
                worst = Status.WARNING if key in free else Status.FAILED
    if not differences:
        return Check(name, Status.OK, detail)
    shown = "; ".join(differences[:_SHOWN])
    if len(differences) > _SHOWN:
        shown += f"; and {len(differences) - _SHOWN} differences more"
    return Check(name, worst, shown, remedy)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            result |= flat(value, name)
        else:
            result[name] = value
    return result
