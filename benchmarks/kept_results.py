"""Figures of compilations that take minutes, kept in a file from run to run."""

import hashlib
import json
from pathlib import Path

from convnext_jax.analysis.inference_cost import compiler_versions

ROOT = Path(__file__).parents[1]


class Results:
    """Figures in a JSON file, each under the program and the versions that it is of."""

    def __init__(self, path):
        self._path = None if path is None else Path(path)
        self._entries = {}
        if self._path is not None and self._path.exists():
            self._entries = json.loads(self._path.read_text(encoding="utf-8"))
        digest = hashlib.sha256()
        for folder in ("models", "training", "data"):
            for file in sorted((ROOT / "convnext_jax" / folder).rglob("*.py")):
                digest.update(file.read_bytes())
        versions = " ".join(f"{name} {version}" for name, version in compiler_versions().items())
        self._stamp = f"{versions}, source {digest.hexdigest()[:12]}"

    def get(self, name):
        """The figures kept under a name, or None."""
        return self._entries.get(f"{name} [{self._stamp}]")

    def put(self, name, figures):
        """Keeps figures, and writes the file at once."""
        self._entries[f"{name} [{self._stamp}]"] = figures
        if self._path is not None:
            draft = self._path.with_name(f"{self._path.name}.tmp")
            draft.write_text(json.dumps(self._entries, indent=1) + "\n", encoding="utf-8")
            draft.replace(self._path)
