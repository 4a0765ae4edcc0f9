"""Where weights may lie, and what they are: this library's checkpoints, and files of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from convnext_jax.convert.detection import Detected, detect
from convnext_jax.convert.families import CONVNEXT, family_named, family_of
from convnext_jax.convert.licences import licence
from convnext_jax.convert.mapped import release_pages
from convnext_jax.convert.mapping import to_variables
from convnext_jax.convert.preprocessing import Preprocessing, preprocessing_for
from convnext_jax.convert.reading import read_weights
from convnext_jax.errors import UserError
from convnext_jax.models.registry import create_model
from convnext_jax.training.checkpoints import Checkpointer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What is known of weights besides their values.

    Attributes:
      model: the module that they belong to, with all its classes.
      model_name: its name in the registry, or None.
      preprocessing: what an image goes through before this model.
      class_names: one per output, or None where they are not known.
      source: where they came from first: a path, a URL or a hub name.
      sha256: of the foreign file, or None.
      layout: whose names the foreign file bears, or None.
      licence: a foreign file's, as far as it is known, or None.
      notes: what else a user should know, one sentence each.
    """

    model: Any
    model_name: str | None
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    source: str
    sha256: str | None = None
    layout: str | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the metadata of a checkpoint."""
        family = family_of(self.model)
        return {
            "model": {
                "family": family.name,
                "name": self.model_name,
                "arguments": family.arguments_of(self.model),
            },
            "num_classes": self.model.num_classes,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names and list(self.class_names),
            "source": self.source,
            "sha256": self.sha256,
            "layout": self.layout,
            "licence": self.licence,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`."""
        names, model = stored["class_names"], stored["model"]
        # Conversions by earlier versions are all of ConvNeXt, and do not say so.
        family = family_named(model.get("family", CONVNEXT.name))
        return cls(
            model=family.network(**model["arguments"]),
            model_name=model["name"],
            preprocessing=Preprocessing.from_dict(stored["preprocessing"]),
            class_names=None if names is None else tuple(names),
            source=stored["source"],
            sha256=stored["sha256"],
            layout=stored["layout"],
            licence=stored.get("licence"),
            notes=tuple(stored["notes"]),
        )


class CheckpointWeights:
    """Those of a checkpoint of this library, from a conversion or from training.

    The best checkpoint is taken, where the run has evaluated, else the newest; of it the moving
    averages, where there are any and they are wanted, else the raw weights.

    Attributes:
      provenance: what they are.
      description: what they are and where, for messages.
      shapes: {"params": …} and where there are any "batch_stats"; every leaf has a `shape` and a
        `dtype`.
    """

    def __init__(self, directory: Path, *, averaged: bool = True) -> None:
        with self._open(directory) as reader:
            step = reader.best_step()
            step = reader.latest_step() if step is None else step
            if step is None:
                raise UserError(f"{directory} holds no checkpoint; give a run that has saved one")
            metadata, saved = reader.metadata(step), reader.shapes(step)
        self._directory, self._step = directory, step
        is_average = averaged and bool(saved.get("ema_params"))
        collections = [name for name in ("params", "batch_stats") if saved.get(name)]
        # Collection → what the state has it under.
        self._groups = {name: f"ema_{name}" if is_average else name for name in collections}
        self.shapes = {name: saved[group] for name, group in self._groups.items()}
        if "preprocessing" in metadata:
            self.provenance = Provenance.from_dict(metadata)
            self.description = f"the weights in {directory} (from {self.provenance.source})"
        else:
            kind = "averaged weights" if is_average else "weights"
            self.description = f"the {kind} of step {step} in {directory}"
            self.provenance = _of_a_run(metadata, self.description)

    def restore(self, abstract: PyTree) -> PyTree:
        """Reads a part of the variables, onto the shardings asked for."""
        here = SingleDeviceSharding(jax.local_devices()[0])

        def as_stored(asked: jax.ShapeDtypeStruct, stored: Any) -> jax.ShapeDtypeStruct:
            sharding = here if asked.sharding is None else asked.sharding
            return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)

        found = jax.tree.map(as_stored, abstract, _part(self.shapes, abstract))
        with self._open(self._directory) as reader:
            restored = reader.restore(
                {self._groups[name]: tree for name, tree in found.items()}, self._step, partial=True
            )
        assert restored is not None
        variables = {name: restored.state[self._groups[name]] for name in found}
        return jax.tree.map(lambda x, asked: x.astype(asked.dtype), variables, abstract)

    def arrays(self) -> PyTree:
        """All variables as NumPy arrays of their stored dtypes."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.shapes)
        return jax.tree.map(np.asarray, self.restore(abstract))

    @staticmethod
    def _open(directory: Path) -> Checkpointer:
        return Checkpointer(directory, read_only=True, best_metric="score")


class ForeignWeights:
    """Those of a PyTorch or safetensors file, under whatever names it gives them.

    Attributes:
      file: what was read.
      detected: its layout and model.
      provenance: what they are.
      description: what they are and where, for messages.
      shapes: {"params": …} and where there are any "batch_stats"; every leaf has a `shape` and a
        `dtype`.
    """

    def __init__(self, source: str | Path, *, sha256: str | None = None) -> None:
        file = read_weights(source, sha256=sha256)
        detected = detect(file.tensors, file.metadata)
        self.file, self.detected = file, detected
        self._variables = to_variables(file.tensors, detected)
        self.shapes = self._variables
        model = detected.model
        preprocessing = preprocessing_for(file.source, file.metadata, detected)
        self.provenance = Provenance(
            model=model,
            model_name=detected.model_name,
            preprocessing=preprocessing,
            class_names=_labels(file.metadata, model.num_classes),
            source=file.source,
            sha256=file.sha256,
            layout=detected.layout.name,
            licence=licence(file.metadata, detected),
            notes=tuple(filter(None, (*detected.notes, _left_out(detected), preprocessing.note))),
        )
        self.description = f"the {detected.layout.name} weights in {file.source}"

    def restore(self, abstract: PyTree) -> PyTree:
        """Places a part of the variables on devices, one tensor after the other."""
        here = SingleDeviceSharding(jax.local_devices()[0])

        def place(asked: jax.ShapeDtypeStruct, array: np.ndarray) -> jax.Array:
            # Each process reads the parts that its own devices hold.
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return np.ascontiguousarray(array[index]).astype(asked.dtype, copy=False)

            sharding = here if asked.sharding is None else asked.sharding
            return jax.make_array_from_callback(asked.shape, sharding, part)

        return jax.tree.map(place, abstract, _part(self._variables, abstract))

    def arrays(self) -> PyTree:
        """All variables as NumPy arrays, views of the mapped file; see `to_variables`."""
        return self._variables

    def release(self) -> None:
        """Lets the system take back the memory of what has been read of the file."""
        for array in self.file.tensors.values():
            release_pages(array)


def find_weights(
    source: str | Path, *, sha256: str | None = None, averaged: bool = True
) -> CheckpointWeights | ForeignWeights:
    """Finds weights and says what they are, before any tensor is read.

    Args:
      source: a directory that `python -m convnext_jax.convert` wrote, the workdir of a run (or its
        directory of checkpoints), or what `read_weights` takes: a file, a directory of a sharded
        checkpoint, a URL, or `hf://owner/name`.
      sha256: what a foreign file must hash to.
      averaged: whether a run's moving average goes before its raw weights.

    Returns:
      The weights.

    Raises:
      UserError: if there is nothing of the kind.
    """
    text = str(source)
    if "://" not in text:
        root = Path(text).expanduser()
        for directory in (root / "checkpoints", root):
            if directory.is_dir() and any(path.name.isdigit() for path in directory.iterdir()):
                if sha256 is not None:
                    raise UserError(
                        f"{directory} is a checkpoint of this library, and a SHA-256 is checked "
                        "of foreign files alone; leave it out"
                    )
                return CheckpointWeights(directory, averaged=averaged)
        if (root / "checkpoints").is_dir():
            raise UserError(f"{root} holds no checkpoint; give a run that has saved one")
    return ForeignWeights(source, sha256=sha256)


def _part(tree: PyTree, like: PyTree) -> PyTree:
    if not isinstance(like, Mapping):
        return tree
    return {key: _part(tree[key], branch) for key, branch in like.items()}


def _of_a_run(metadata: Mapping[str, Any], source: str) -> Provenance:
    config, fields = metadata["config"], metadata["config"]["model"]
    augment, data = config["augment"], config["data"]
    # Runs by earlier versions were evaluated at the size that they were trained at.
    size = data.get("eval_image_size") or data["image_size"]
    whole = augment["crop"] == "pad" or size >= 384
    names = metadata.get("class_names") or ()
    return Provenance(
        model=create_model(
            fields["name"], num_classes=metadata["num_classes"], **fields["overrides"]
        ),
        model_name=None if fields["overrides"] else fields["name"],
        preprocessing=Preprocessing(
            image_size=size,
            resize_size=None if whole else int(size / augment["eval_crop_ratio"]),
            interpolation=augment["interpolation"],
            mean=tuple(augment["mean"]),
            std=tuple(augment["std"]),
        ),
        # A config may ask for more outputs than its data set has classes.
        class_names=tuple(names) if len(names) == metadata["num_classes"] else None,
        source=source,
    )


def _left_out(detected: Detected) -> str:
    names = [name for name in detected.ignored if not detected.layout.is_derived(name)]
    if not names:
        return ""
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    noun = "tensor that is" if len(names) == 1 else "tensors that are"
    return f"left out {len(names)} {noun} no part of the {detected.family.name}: {few}"


def _labels(metadata: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """Class names of a transformers config, if it has real ones."""
    labels = {
        int(k): str(v) for k, v in ((metadata.get("config") or {}).get("id2label") or {}).items()
    }
    if sorted(labels) != list(range(num_classes)) or not num_classes:
        return None
    if all(name == f"LABEL_{i}" for i, name in labels.items()):
        return None
    return tuple(labels[i] for i in range(num_classes))
