"""Checks that run one after the other, none of which can keep the rest from running."""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from convnext_jax.errors import UserError

T = TypeVar("T")

# Enough for a slow disk's first answers; a dead mount would let a check wait for ever.
SECONDS = 60.0


class Status(enum.StrEnum):
    """What became of a check; the worst last."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Finding(Generic[T]):
    """What a check returns.

    Attributes:
      detail: what was seen, for a person.
      value: what later checks need of it.
      status: `FAILED` where the run would fail, `WARNING` where it would suffer.
      remedy: what to do about it; "" where the detail says it.
      measure: the figure that the check is about, if it has one. Of several processes the table
        shows the one with the lowest.
    """

    detail: str
    value: T
    status: Status = Status.OK
    remedy: str = ""
    measure: float | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of one process's result; see `Finding`. JSON-able by `dataclasses.asdict`."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    measure: float | None = None


@dataclasses.dataclass(frozen=True)
class Missing:
    """Stands for the value of a check that failed or was left out.

    Attributes:
      name: of the check that failed first.
    """

    name: str


class Examination:
    """Runs checks and keeps what they found.

    Attributes:
      checks: in the order of their running.
      hanging: names of the checks that had not ended in time, and whose threads still wait.
    """

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.hanging: list[str] = []

    def check(
        self,
        name: str,
        function: Callable[..., Finding[T]],
        *inputs: Any,
        needs: Sequence[Any] = (),
        seconds: float = SECONDS,
    ) -> T | Missing:
        """Runs one check, for at most `seconds`, and adds its line to `checks`.

        Args:
          name: of the line.
          function: called with `inputs`. A `UserError` becomes the line's text; any other exception
            too, with its type.
          *inputs: if one of them is `Missing` the check is left out.
          needs: values of checks that must have gone well besides.
          seconds: after which it counts as failed. Its thread can't be stopped and is left behind.

        Returns:
          The finding's value, or `Missing`.
        """
        missing = next((x for x in (*inputs, *needs) if isinstance(x, Missing)), None)
        if missing is not None:
            self.skip(name, f"not looked at, since {missing.name!r} failed")
            return missing
        outcome: list[Finding[T] | BaseException] = []

        def run() -> None:
            try:
                outcome.append(function(*inputs))
            except BaseException as error:
                outcome.append(error)

        # A daemon, since what waits for a dead disk or a lost peer can't be interrupted.
        thread = threading.Thread(target=run, name=f"preflight {name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if not outcome:
            self.hanging.append(name)
            self._fail(
                name,
                f"not done after {seconds:g} s",
                "something does not answer: a mounted disk or bucket, or another process",
            )
            return Missing(name)
        found = outcome[0]
        if isinstance(found, UserError):
            self._fail(name, str(found))
            return Missing(name)
        if isinstance(found, BaseException):
            self._fail(name, f"{type(found).__name__}: {found}".strip())
            return Missing(name)
        self.checks.append(Check(name, found.status, found.detail, found.remedy, found.measure))
        return found.value

    def skip(self, name: str, why: str) -> None:
        """Adds the line of a check that is left out."""
        self.checks.append(Check(name, Status.SKIPPED, why))

    def _fail(self, name: str, detail: str, remedy: str = "") -> None:
        self.checks.append(Check(name, Status.FAILED, detail, remedy))
