"""What a config describes, built as the training program builds it, but for the arrays."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from convnext_jax import config_files, experiment
from convnext_jax.analysis.macs import count_macs, count_parameters
from convnext_jax.convert.stored import find_weights
from convnext_jax.data.sources import Source
from convnext_jax.errors import UserError
from convnext_jax.models.registry import Network
from convnext_jax.preflight.examination import Finding, Status
from convnext_jax.training import sharding
from convnext_jax.training.init_from import choose
from convnext_jax.training.state import TrainState, abstract_state


def config(path: str, overrides: list[str]) -> Finding[ConfigDict]:
    """Loads the config.

    Raises:
      UserError: see `config_files.load_config`.
    """
    loaded = config_files.load_config(path, overrides)
    text = json.dumps(loaded.to_dict(), sort_keys=True)
    if loaded.init_from == "":
        raise UserError(
            "this recipe fine-tunes: say from what by --config.init_from=WEIGHTS, or "
            "--config.init_from=None to start from random weights"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Finding(f"{path}, {loaded.model.name}, hash {digest}", loaded)


def devices(libtpu: str) -> Finding[dict[str, str | int]]:
    """The devices that JAX finds, and whether they are those that the machine was rented for.

    Args:
      libtpu: its version, or "none".

    Returns:
      "kind" and "local" (their number on this process), which must be alike on all.
    """
    every = jax.devices()
    kind, local = every[0].device_kind, jax.local_device_count()
    processes = jax.process_count()
    where = f"{local} on each of {processes} processes" if processes > 1 else "on one process"
    detail = f"{len(every)} × {kind}, {where}"
    found: dict[str, str | int] = {"kind": kind, "local": local}
    if every[0].platform == "cpu" and libtpu != "none":
        return Finding(
            f"{detail}, although libtpu {libtpu} is installed",
            found,
            Status.WARNING,
            "another process may hold the TPUs (end it), or JAX_PLATFORMS is cpu (unset it)",
        )
    return Finding(detail, found)


def mesh(loaded: ConfigDict) -> Finding[jax.sharding.Mesh]:
    """The devices, laid out as the config asks.

    Raises:
      UserError: if there are more or fewer than it asks for.
    """
    made = sharding.create_mesh(loaded.mesh.data, loaded.mesh.fsdp)
    return Finding(", ".join(f"{axis} {length}" for axis, length in made.shape.items()), made)


def batch_sizes(loaded: ConfigDict, made: jax.sharding.Mesh) -> Finding[None]:
    """Whether batches can be cut into equal parts.

    Raises:
      UserError: naming the field and what it must be a multiple of.
    """
    experiment.check_batch_sizes(loaded, made.size)
    repeats, rows = loaded.data.repeats, loaded.batch_size // jax.process_count()
    if repeats < 1 or rows % repeats:
        raise UserError(
            f"config.data.repeats = {repeats} does not divide the {rows} images of a process"
        )
    steps = loaded.optim.accumulation_steps
    micro = f" in {steps} micro-batches" if steps > 1 else ""
    return Finding(
        f"{loaded.batch_size} images a step, {loaded.batch_size // made.size} a device{micro}; "
        f"{loaded.eval_batch_size} in evaluation",
        None,
    )


def durations(loaded: ConfigDict, source: Source) -> Finding[experiment.Durations]:
    """The run's length in steps.

    Raises:
      UserError: see `experiment.durations`.
    """
    steps = experiment.durations(loaded, len(source))
    return Finding(
        f"{steps.total:,} steps, {steps.steps_per_epoch:,} an epoch, warm-up {steps.warmup:,}; a "
        f"checkpoint every {steps.checkpoint_every:,}",
        steps,
    )


def augmentation(loaded: ConfigDict) -> Finding[None]:
    """What is done to images, on the hosts and on the devices.

    Raises:
      UserError: for a value that does not exist.
    """
    experiment.train_transform(loaded)
    experiment.eval_transform(loaded)
    experiment.build_augmentation(loaded)
    experiment.build_mixing(loaded)
    experiment.build_loss(loaded)
    policy = loaded.augment.policy or "no policy"
    return Finding(f"{loaded.data.decoder} decoder, {loaded.augment.crop} crop, {policy}", None)


def model(loaded: ConfigDict, source: Source, made: jax.sharding.Mesh) -> Finding[Network]:
    """The network.

    Raises:
      UserError: see `experiment.build_model`.
    """
    built = experiment.build_model(loaded, source.num_classes, made.size)
    experiment.check_kernels(built, made)
    size = loaded.data.image_size
    return Finding(
        f"{count_parameters(built, size) / 1e6:,.1f} M parameters, "
        f"{count_macs(built, size) / 1e9:,.2f} G MACs at {size} pixels, {built.num_classes} "
        f"classes, {loaded.model.dtype}",
        built,
    )


def state(
    loaded: ConfigDict, built: Network, steps: experiment.Durations, made: jax.sharding.Mesh
) -> Finding[TrainState]:
    """Shapes and shardings of all that is kept from step to step.

    Returns:
      A TrainState of ShapeDtypeStructs.

    Raises:
      UserError: if the optimizer's fields contradict each other.
    """
    optimizer, _ = experiment.build_optimizer(loaded, built, steps)
    size = (loaded.data.image_size, loaded.data.image_size, 3)
    abstract = abstract_state(built, optimizer, size, made, ema=loaded.ema_decay is not None)
    return Finding(
        f"{whole_bytes(abstract) / 2**20:,.0f} MiB, of it on a device "
        f"{device_bytes(abstract) / 2**20:,.0f} MiB",
        abstract,
    )


def initial_weights(loaded: ConfigDict, abstract: TrainState) -> Finding[None]:
    """Whether the weights to start from are there and fit; every process must call it.

    Args:
      loaded: the config.
      abstract: the state that they are for.

    Raises:
      UserError: naming the field, and every tensor that does not fit.
    """
    if loaded.init_from is None:
        return Finding("random, by config.seed", None)
    try:
        weights = find_weights(loaded.init_from)
        choose(abstract.params, weights)
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    return Finding(weights.description, None)


def whole_bytes(tree: Any) -> int:
    """What a tree of arrays weighs, each counted once however many devices hold it."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """What one device holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def process_bytes(tree: Any) -> int:
    """What this process's devices hold of a tree, copies on several of them counted once."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        shards = len({str(index) for index in places.values()})
        shard = int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
        total += shards * shard * leaf.dtype.itemsize
    return total
