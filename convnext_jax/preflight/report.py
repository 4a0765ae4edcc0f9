"""What one process has found, as it is sent to process 0."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from convnext_jax.preflight.examination import Check, Status


@dataclasses.dataclass(frozen=True)
class Report:
    """One process's findings.

    Attributes:
      host: where it runs.
      checks: their lines.
      facts: what is to be compared with the others', JSON-able.
    """

    host: str
    checks: list[Check]
    facts: dict[str, Any]

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        checks = [Check(**{**c, "status": Status(c["status"])}) for c in fields["checks"]]
        return cls(fields["host"], checks, fields["facts"])
