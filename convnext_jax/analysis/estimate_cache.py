"""Estimates kept in a file, since each has taken the TPU compiler's time."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from convnext_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class InferenceEstimate:
    """What the TPU compiler expects of a batch's forward pass on one chip. Nothing is measured.

    Attributes:
      images_per_second: of one chip.
      batch_size: images of the pass.
      cycles: estimated, of the whole program.
      without_estimate: runs of operations that take time of which the compiler says nothing; they
        count nothing, so the rate is a little too high.
    """

    images_per_second: float
    batch_size: int
    cycles: float
    without_estimate: float


class EstimateCache:
    """Estimates in a JSON file, each beside a digest of the program that it is of.

    A network, a compiler or a topology that has changed has another digest, so that nothing in the
    file can be out of date.

    Args:
      path: the file, which need not exist; None to keep estimates for this object's life.

    Raises:
      UserError: if the file holds something else, or its directory is missing.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self._path = None if path is None else Path(path)
        self._entries: dict[str, Any] = {}
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            raise UserError(f"{self._path}: there is no directory {self._path.parent}")
        if not self._path.exists():
            return
        try:
            self._entries = json.loads(self._path.read_text(encoding="utf-8"))["estimates"]
            for digest in self._entries:
                self.get(digest)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path} holds no estimates of this program; give another name"
            ) from error

    def get(self, digest: str) -> InferenceEstimate | None:
        """The estimate kept under a digest, or None."""
        entry = self._entries.get(digest)
        return None if entry is None else InferenceEstimate(**entry["estimate"])

    def put(self, digest: str, label: str, estimate: InferenceEstimate) -> None:
        """Keeps an estimate, and writes the file at once.

        Args:
          digest: of the program.
          label: what it is, for a person who reads the file.
          estimate: to keep.

        Raises:
          UserError: if the file can't be written.
        """
        self._entries[digest] = {"label": label, "estimate": dataclasses.asdict(estimate)}
        if self._path is None:
            return
        draft = self._path.with_name(self._path.name + ".tmp")
        try:
            text = json.dumps({"estimates": self._entries}, indent=1)
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(self._path)
        except OSError as error:
            raise UserError(
                f"{self._path} can't be written: {error.strerror}; give another name"
            ) from error
