"""Reading one checkpoint: what it holds, whether it fits, and what is wrong with a damaged one.

Beside `checkpoints.py`, which says what a checkpoint is, this file alone imports Orbax.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from convnext_jax.errors import UserError

STATE = "state"
METADATA = "metadata"

# What a storage system answers when the checkpoint may be whole but cannot be had now. Falling
# back to an older one on these would throw work away without need.
_NOT_DAMAGE = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED"
)
_LEAVES_SHOWN = 5


def shapes(path: epath.Path) -> Any:
    """What a checkpoint holds, before any of its arrays is read.

    Args:
      path: directory of the checkpoint.

    Returns:
      The saved tree as nested dicts, whose leaves have a `shape` and a `dtype`.

    Raises:
      UserError: if the checkpoint can't be read.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(path / STATE).tree
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    finally:
        handler.close()


def metadata(path: epath.Path) -> dict[str, Any]:
    """What the caller of `Checkpointer.save` gave as metadata.

    Raises:
      UserError: if it can't be read.
    """
    try:
        return dict(read_beside(path)["metadata"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def read_beside(path: epath.Path) -> dict[str, Any]:
    """The JSON file beside the arrays: "metadata" and "metrics"; raises whatever goes wrong."""
    return dict(ocp.JsonCheckpointHandler().restore(path / METADATA))


def replace_metrics(path: epath.Path, metrics: Mapping[str, float]) -> None:
    """Writes the JSON file beside the arrays anew, with other metrics; call it on one process."""
    file = path / METADATA / METADATA
    draft = file.with_name(f"{METADATA}.tmp")
    draft.write_text(json.dumps({**read_beside(path), "metrics": dict(metrics)}))
    draft.replace(file)


def read_state(path: epath.Path, abstract_state: Any, *, partial: bool) -> Any:
    """The arrays of a checkpoint, on the shardings asked for; raises whatever goes wrong.

    Args:
      path: directory of the checkpoint.
      abstract_state: a pytree of `jax.ShapeDtypeStruct` that carry shardings.
      partial: allow the checkpoint to hold more.

    Raises:
      UserError: if it does not fit `abstract_state`.
    """
    # The handler itself, since `CheckpointManager.restore` ends in a barrier, at which the other
    # processes would hang when one of them cannot read its shards.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        how = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        with jax.transfer_guard("allow"), _silent_stragglers():
            saved = _leaves(handler.metadata(path / STATE).tree)
            _check_fit(path, saved, _leaves(abstract_state), partial)
            # Held to fit by now; Orbax would also hold it to fields that are None on one side.
            return handler.restore(
                path / STATE,
                args=ocp.args.PyTreeRestore(
                    item=abstract_state, restore_args=how, partial_restore=True
                ),
            )
    finally:
        handler.close()


def _unreadable(path: epath.Path, error: BaseException) -> UserError:
    return UserError(
        f"the checkpoint {path} can't be read ({describe_damage(error) or error}); take another"
    )


def describe_damage(error: BaseException) -> str | None:
    """One line on what is wrong with the checkpoint, or None if the fault is not its own."""
    if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):
        return None
    while error.__cause__ is not None:
        error = error.__cause__
    away = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if away or _NOT_DAMAGE.search(str(error)):
        return None
    return one_line(error)


def one_line(error: BaseException) -> str:
    """An exception's kind and the beginning of what it says."""
    line = f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]
    return line if len(line) <= 200 else line[:197] + "..."


@contextlib.contextmanager
def _silent_stragglers() -> Iterator[None]:
    """Keeps quiet about array reads that end after another array's failure has ended the restore.

    Orbax reads all arrays at once on an event loop that it closes at the first failure; each of
    the others then reports to stderr that the loop is closed, when no one waits for it any more.
    Such reports may come long after the failure, so then the hook stays in place.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Maps "params/stem/kernel" to (shape, dtype's name); typed keys show as their raw data.

    Orbax stores dataclasses and named tuples as mappings and all sequences as lists, so only the
    names along the path are compared, not the containers.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(
            str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path
        )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        leaves[name] = (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    return leaves


def _check_fit(
    path: epath.Path,
    saved: Mapping[str, tuple[tuple[int, ...], str]],
    asked: Mapping[str, tuple[tuple[int, ...], str]],
    partial: bool,
) -> None:
    def text(leaf: tuple[tuple[int, ...], str] | None) -> str:
        return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"

    names = asked if partial else dict.fromkeys([*asked, *saved])
    wrong = [name for name in names if asked.get(name) != saved.get(name)]
    if wrong:
        lines = [
            f"\n  {name}: {text(saved.get(name))} in the checkpoint, {text(asked.get(name))} here"
            for name in wrong[:_LEAVES_SHOWN]
        ]
        if len(wrong) > _LEAVES_SHOWN:
            lines.append(f"\n  and {len(wrong) - _LEAVES_SHOWN} more")
        raise UserError(
            f"the checkpoint {path} does not fit this model and optimizer, {len(wrong)} leaves "
            f"differ; use the config that it was trained with, or a new workdir:{''.join(lines)}"
        )
