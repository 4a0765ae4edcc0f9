"""What process 0 makes of all processes' reports: what differs, and what they can do together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convnext_jax.preflight import versions
from convnext_jax.preflight.agreement import agreement
from convnext_jax.preflight.examination import Check, Status
from convnext_jax.preflight.report import Report
from convnext_jax.preflight.table import named

# The certificates of storage services and the order of log lines go by the clock.
_CLOCK_SECONDS = 2.0
# Fields whose difference leaves the computation the same.
_FREE_FIELDS = ("data.workers", "data.data_dir")


def hosts_of(reports: Sequence[Report | None]) -> list[str]:
    """The name of each process's host, as far as it is known."""
    return ["unknown host" if report is None else report.host for report in reports]


def decide(reports: Sequence[Report | None]) -> dict[str, Any]:
    """What the processes are to do together, from what each has found alone.

    Args:
      reports: by process, None for one that has not reported.

    Returns:
      "hosts"; "token", the file of process 0 in its workdir, or None; and for each check that needs
      all processes "" if they can take part, else why not.
    """
    hosts = hosts_of(reports)
    absent = [process for process, report in enumerate(reports) if report is None]
    why = ""
    if absent:
        why = f"not tried, since {named(absent, hosts)} has not reported"
    elif any(report.facts["devices"] is None for report in reports if report):
        why = "not tried, since 'devices' failed"
    elif any(check.status is Status.FAILED for check in compare(reports)[:2]):
        why = "not tried, since the processes are not alike"
    without = any(report and not report.facts["state"] for report in reports)
    return {
        "hosts": list(hosts),
        "token": reports[0] and reports[0].facts["token"],
        "all-reduce": why,
        "initial weights": why or ("not looked at, since 'state' failed" if without else ""),
    }


def compare(reports: Sequence[Report | None]) -> list[Check]:
    """Holds against each other what must be alike on all processes: versions and devices first."""
    hosts = hosts_of(reports)

    def fact(name: str) -> list[Any]:
        return [report and report.facts.get(name) for report in reports]

    first = next(report for report in reports if report is not None)
    found = [
        agreement(
            "versions",
            fact("versions"),
            hosts,
            detail=versions.describe(first.facts["versions"]),
            remedy="install the same on all hosts: pip install the same requirements, the same "
            "commit of this package, and set the same environment",
        )
    ]
    if len(reports) > 1:
        found += [
            agreement(
                "same devices",
                fact("devices"),
                hosts,
                detail="the same kind and number on each process",
                remedy="end what holds the missing ones, or take a slice of one kind",
            ),
            agreement(
                "same config",
                fact("config"),
                hosts,
                detail="all processes have loaded the same",
                remedy="copy the config file to all hosts, and give all the same command",
                free=_FREE_FIELDS,
            ),
            agreement(
                "same data set",
                fact("data"),
                hosts,
                detail="the same examples on all processes",
                remedy="copy the data set anew to the hosts where it differs",
            ),
        ]
    return found


def late(reports: Sequence[Report | None]) -> list[Check]:
    """Says which processes have not reported, if any."""
    hosts = hosts_of(reports)
    absent = [process for process, report in enumerate(reports) if report is None]
    if not absent:
        return []
    detail = f"{named(absent, hosts)} has not reported in time"
    return [Check("reports", Status.FAILED, detail, "see what that process prints, and its host")]


def clocks(reports: Sequence[Report | None]) -> list[Check]:
    """Holds the hosts' clocks to that of process 0; a moment's travel is in the figures."""
    hosts = hosts_of(reports)
    skews = [abs(report.facts["clock"]) if report else 0.0 for report in reports]
    if len(reports) == 1:
        return []
    off = [process for process, skew in enumerate(skews) if skew > _CLOCK_SECONDS]
    if off:
        return [
            Check(
                "clocks",
                Status.WARNING,
                f"up to {max(skews):.1f} s from that of process 0 on {named(off, hosts)}",
                "let them be set by NTP (timedatectl set-ntp true)",
            )
        ]
    return [Check("clocks", Status.OK, f"within {max(skews):.2f} s of that of process 0")]
