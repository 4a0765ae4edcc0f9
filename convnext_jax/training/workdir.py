"""A run's directory, and the config that it is held to from its first start to its last resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from convnext_jax.errors import UserError

_log = logging.getLogger("convnext_jax")


def absolute_path(path: str | os.PathLike[str]) -> epath.Path:
    """The path made absolute, `~` expanded; a URL such as `gs://…` stays as it is."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def local_workdir(workdir: str | os.PathLike[str]) -> Path:
    """The path of a run's directory, which need not be there yet.

    Raises:
      UserError: if it is a URL, where logs can't be appended to, or a file.
    """
    if "://" in os.fspath(workdir):
        raise UserError(
            f"--workdir {workdir} is a URL; mount the bucket on every host (docs/pods.md), and "
            "give the path"
        )
    path = Path(workdir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir {path} is a file; give a directory")
    return path


def check_config(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    allow: bool,
    ignore: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    how_to_allow: str = "allow the change",
) -> list[str]:
    """Holds a run to the config that it was started with, which lies in `WORKDIR/config.json`.

    The first start writes the file (process 0, atomically). A later start compares. With `allow`,
    differences are logged, the old file is kept as `config.1.json`, `config.2.json`, … and the new
    one written.

    Args:
      workdir: the run's directory; created if absent.
      config: nested mappings down to JSON-able values (tuples count as lists).
      allow: whether another config is accepted.
      ignore: dotted paths that do not matter for resuming (`"log_every"`, `"data.num_workers"`); a
        path also covers what lies below it. They are never reported, and alone write nothing.
      defaults: what a field stands at that the file lacks, since it is older than the field.
      how_to_allow: the remedy that the error names, as the program spells it.

    Returns:
      The differences, one `field: old -> new` each.

    Raises:
      UserError: naming every field that differs, unless allowed; or if the file is not JSON.
    """
    differences = config_differences(workdir, config, ignore=ignore, defaults=defaults)
    path = absolute_path(workdir) / "config.json"
    new = json.loads(json.dumps(config))
    if differences is None:
        _write_config(path, new)
        return []
    if not differences:
        return []
    listed = "".join(f"\n  {line}" for line in differences)
    if not allow:
        raise UserError(
            f"{path.parent} was started with another config; start in a new workdir, or "
            f"{how_to_allow}:{listed}"
        )
    if jax.process_index() == 0:
        number = 1
        while (kept := path.with_name(f"config.{number}.json")).exists():
            number += 1
        path.copy(kept)
        _log.warning("the config has changed (the former one is kept as %s):%s", kept, listed)
    _write_config(path, new)
    return differences


def config_differences(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[str] | None:
    """Compares a config with the one in `WORKDIR/config.json`; writes nothing.

    Args:
      workdir: see `check_config`.
      config: see `check_config`.
      ignore: see `check_config`.
      defaults: see `check_config`.

    Returns:
      The differences, one `field: old -> new` each; None if there is no file.

    Raises:
      UserError: if the file is not JSON.
    """
    path = absolute_path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it or remove it") from error
    new, known = (json.loads(json.dumps(tree or {})) for tree in (config, defaults))
    return _differences(old, new, ignore, known)


def _write_config(path: epath.Path, config: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name("config.json.tmp")
        draft.write_text(json.dumps(config, indent=2) + "\n")
        draft.replace(path)


def _differences(old: Any, new: Any, ignore: Sequence[str], defaults: Any) -> list[str]:
    absent = object()

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict) or not tree:
            return {prefix: tree}
        parts = (flat(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items())
        return {name: value for part in parts for name, value in part.items()}

    def text(value: Any) -> str:
        return "(absent)" if value is absent else json.dumps(value)

    before, after = flat(old), flat(new)
    before = {n: v for n, v in flat(defaults).items() if n in after and n not in before} | before
    names = dict.fromkeys([*after, *before])
    return [
        f"{name}: {text(before.get(name, absent))} -> {text(after.get(name, absent))}"
        for name in names
        if text(before.get(name, absent)) != text(after.get(name, absent))
        and not any(name == field or name.startswith(field + ".") for field in ignore)
    ]
