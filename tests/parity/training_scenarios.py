"""Our training step and PyTorch's, side by side on the same batches from the same weights.

What is compared is the step that `train.py` runs, built from a config by the same functions. Each
batch is recorded as the step itself makes it, augmented and mixed, and with it which samples of
which block stochastic depth keeps; PyTorch is given both. Importing this needs torch.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import torch
from ml_collections import ConfigDict
from torch_convnext import ConvNeXt as TorchConvNeXt
from torch_training import Recipe, Training

from convnext_jax import experiment, recipes
from convnext_jax.convert.mapping import from_params
from convnext_jax.convert.stored import find_weights
from convnext_jax.data.mixing import MixConfig
from convnext_jax.models.layers import StochasticDepth
from convnext_jax.training import sharding
from convnext_jax.training.init_from import start_from
from convnext_jax.training.preparation import prepare_batch
from convnext_jax.training.state import abstract_state, create_state
from convnext_jax.training.step import jit_train_step, micro_batches

STEPS, WARMUP, CLASSES = 200, 20, 10
KINDS = ("parameters", "average", "first moment", "second moment")

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A training to be made twice.

    Attributes:
      config: the run; its data is not read, see `digit_batches`.
      data: devices along "data".
      fsdp: devices along "fsdp".
      pretrained: start from weights that PyTorch drew and that our converter reads, each of them
        far from its initial value; else from our own initial weights, which PyTorch is given.
    """

    config: ConfigDict
    data: int = 1
    fsdp: int = 1
    pretrained: bool = False


def _small(config: ConfigDict, depths: tuple[int, ...] = (1, 1, 1, 1)) -> ConfigDict:
    config.model.overrides = {"depths": depths, "dims": (8, 16, 32, 64)}
    config.model.num_classes = CLASSES
    config.model.dtype = "float32"
    config.data.image_size = 32
    config.batch_size = config.eval_batch_size = 16
    config.total = f"{STEPS} steps"
    config.mix.group_size = 4
    return config


def _pretraining() -> ConfigDict:
    config = _small(recipes.imagenet_1k("convnext_tiny", drop_path_rate=0.1))
    config.optim.warmup = f"{WARMUP} steps"
    config.optim.learning_rate = 1e-3  # 4e-3 are for 4,096 images
    return config


def _without_policy() -> ConfigDict:
    # RandAugment and erasing take most of the time to compile, and the batch is recorded behind it.
    config = _pretraining()
    config.augment.policy = ""
    config.augment.erasing_prob = 0.0
    return config


def _accumulation() -> ConfigDict:
    config = _without_policy()
    config.optim.accumulation_steps = 4
    config.ema_decay = 0.99
    return config


def _finetuning() -> ConfigDict:
    config = _small(
        recipes.finetune("convnext_base", image_size=32, drop_path_rate=0.2, layer_decay=0.8),
        depths=(1, 1, 4, 1),
    )
    config.augment.policy = ""
    config.augment.erasing_prob = 0.0
    config.ema_decay = 0.9999  # as XL's
    return config


def _v2() -> ConfigDict:
    config = _small(
        recipes.v2_finetune(
            "convnextv2_base",
            base_learning_rate=6.25e-4,
            epochs=100,
            warmup_epochs=20,
            layer_decay=0.6,
            layer_decay_grouping="group",
            drop_path_rate=0.1,
            image_size=32,
        )
    )
    config.total, config.optim.warmup = f"{STEPS} steps", f"{WARMUP} steps"
    config.optim.learning_rate = 1e-3
    config.augment.policy = ""
    config.augment.erasing_prob = 0.0
    return config


SCENARIOS: Mapping[str, Callable[[], Scenario]] = {
    "pre-training": lambda: Scenario(_pretraining()),
    "fine-tuning, layer decay .8": lambda: Scenario(_finetuning(), pretrained=True),
    "accumulation ×4": lambda: Scenario(_accumulation()),
    "V2 with GRN, layer decay .6": lambda: Scenario(_v2(), pretrained=True),
    "8 devices, data 8": lambda: Scenario(_without_policy(), data=8),
    "8 devices, data 2 × fsdp 4": lambda: Scenario(_without_policy(), data=2, fsdp=4),
}


def digit_batches(config: ConfigDict, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches of handwritten digits, each pixel made 4 × 4: uint8 images, int32 labels."""
    digits = sklearn.datasets.load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(levels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int32)
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.choice(len(images), config.batch_size, replace=False)
        yield {"image": images[rows], "label": labels[rows]}


class OurRun:
    """A run of a config as `train.py` builds it, without files and loop."""

    def __init__(self, scenario: Scenario):
        config = scenario.config
        devices = jax.devices()[: scenario.data * scenario.fsdp]
        self.mesh = sharding.create_mesh(scenario.data, scenario.fsdp, devices)
        self.model = experiment.build_model(config, CLASSES, self.mesh.size)
        steps = experiment.durations(config, config.batch_size * STEPS)
        optimizer, schedule = experiment.build_optimizer(config, self.model, steps)
        size = (config.data.image_size, config.data.image_size, 3)
        arguments = (self.model, optimizer, size, self.mesh)
        ema = config.ema_decay is not None
        abstract = abstract_state(*arguments, ema=ema)
        self.state = create_state(*arguments, seed=config.seed, ema=ema)
        self._step = jit_train_step(
            experiment.build_train_step(config, self.model, optimizer, schedule, self.mesh),
            abstract,
            self.mesh,
        )

    def start_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes weights by the way that a user's file of PyTorch's takes."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "weights.pth"
            torch.save({"model": dict(tensors)}, path)
            self.state = start_from(self.state, find_weights(str(path)))

    def step(self, batch: Mapping[str, np.ndarray]) -> float:
        """Trains on one batch; its loss before the step."""
        placed = sharding.to_global(batch, sharding.batch_sharding(self.mesh))
        self.state, metrics = self._step(self.state, placed)
        assert metrics["finite"]
        return float(metrics["loss"])

    def tensors(self) -> dict[str, Arrays]:
        """As `Training.tensors`, named and shaped by the converter."""
        state = self.state
        trees = {
            "parameters": state.params,
            "first moment": optax.tree.get(state.opt_state, "mu"),
            "second moment": optax.tree.get(state.opt_state, "nu"),
        }
        if state.ema_params is not None:
            trees["average"] = state.ema_params
        return {
            kind: from_params(jax.device_get(tree), self.model, "official")
            for kind, tree in trees.items()
        }


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the model is given at one step.

    Attributes:
      batch: as the loader gives it.
      images: float32 (B, H, W, 3), augmented, normalised and mixed.
      targets: float32 (B, K).
      kept: for each micro-batch and block, which samples keep the branch; None where all do.
    """

    batch: dict[str, np.ndarray]
    images: np.ndarray
    targets: np.ndarray
    kept: list[list[np.ndarray | None]]


def record(config: ConfigDict, model: nn.Module) -> list[Recorded]:
    """Makes the batches of a run, by the step's own functions and its keys, on one device."""
    count = config.optim.accumulation_steps
    blocks = sum(model.depths)
    augmentation = experiment.build_augmentation(config)
    mixing: MixConfig = experiment.build_mixing(config)

    def decisions(variables: Any, images: jax.Array, key: jax.Array) -> list[jax.Array | None]:
        kept: list[jax.Array | None] = []

        def listen(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
            if not isinstance(context.module, StochasticDepth):
                return call(*arguments, **keywords)
            branch, train = arguments
            kept.append(None)
            if context.module.rate == 0:
                return branch
            # The layer's own decision, seen on a branch of ones.
            factor = call(jnp.ones((branch.shape[0], 1, 1, 1), branch.dtype), train)
            kept[-1] = factor.reshape(-1) > 0
            return branch * factor

        with nn.intercept_methods(listen):
            model.apply(variables, images, train=True, rngs={"dropout": key})
        assert len(kept) == blocks
        return kept

    @jax.jit
    def make(step: jax.Array, batch: dict[str, jax.Array]) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        key_batch, key_model = jax.random.split(key)
        images, targets = prepare_batch(
            key_batch,
            batch,
            num_classes=CLASSES,
            augment_config=augmentation,
            mix_config=mixing,
        )
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        # Only the keys matter to what is drawn, and what computes the rest is left out by XLA.
        variables = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        parts = [images] if count == 1 else list(micro_batches(images, count))
        keys = [key_model if count == 1 else jax.random.fold_in(key_model, i) for i in range(count)]
        kept = [decisions(variables, part, key) for part, key in zip(parts, keys, strict=True)]
        return images, targets, kept

    recorded = []
    for step, batch in zip(range(STEPS), digit_batches(config), strict=False):
        images, targets, kept = jax.device_get(make(jnp.int32(step), batch))
        recorded.append(Recorded(batch, np.asarray(images), np.asarray(targets), kept))
    return recorded


def torch_model(config: ConfigDict) -> TorchConvNeXt:
    """PyTorch's model of a config, with random weights of its own."""
    overrides = config.model.overrides
    v2 = config.model.name.startswith("convnextv2")
    return TorchConvNeXt(
        CLASSES,
        overrides.depths,
        overrides.dims,
        drop_path_rate=config.model.drop_path_rate,
        layer_scale=0.0 if v2 else 1e-6,
        use_grn=v2,
        head_init_scale=config.model.head_init_scale,
    )


def torch_recipe(config: ConfigDict) -> Recipe:
    """The numbers of a config, for PyTorch."""
    optim = config.optim
    warmup, unit = optim.warmup.split()
    assert unit == "steps" or int(warmup) == 0
    return Recipe(
        learning_rate=optim.learning_rate,
        min_learning_rate=optim.min_learning_rate,
        warmup_steps=int(warmup),
        total_steps=STEPS,
        weight_decay=optim.weight_decay,
        betas=(optim.b1, optim.b2),
        eps=optim.eps,
        layer_decay=optim.layer_decay or 1.0,
        ema_decay=config.ema_decay,
        accumulation_steps=optim.accumulation_steps,
    )


def as_if_pretrained(model: TorchConvNeXt, seed: int = 0) -> None:
    """Draws weights that hide nothing: γ and the norms' weights around 1, GRN's around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.startswith("head."):
                value.copy_(0.02 * model.head.weight.std() * noise)
            elif ".grn." in name:
                value.copy_(0.3 * noise)
            elif value.ndim > 1:
                value.copy_(noise / np.sqrt(value[0].numel()))
            elif name.endswith("bias"):
                value.copy_(0.1 * noise)
            else:
                value.copy_(1 + 0.1 * noise)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs of the same batches, held against each other.

    Attributes:
      losses: relative deviation at each step (STEPS,).
      tensors: by kind and name: ‖a − b‖ / ‖b‖ of the final tensor.
      moves: the same of what training added to it, by the kinds that had an initial value.
    """

    losses: np.ndarray
    tensors: dict[str, dict[str, float]]
    moves: dict[str, dict[str, float]]

    def worst(self, kind: str) -> tuple[str, float]:
        """The name of the tensor that deviates most, and its deviation."""
        return max(self.tensors[kind].items(), key=lambda item: item[1])

    def worst_move(self, kind: str) -> tuple[str, float]:
        """As `worst`, relative to the way that the tensor has gone."""
        return max(self.moves[kind].items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What a run leaves: its losses, its final tensors by kind, and the weights that it began with.

    A moment's and an average's are by the same names as their parameters.
    """

    losses: np.ndarray
    tensors: dict[str, Arrays]
    weights: Arrays

    def against(self, other: Trajectory) -> Comparison:
        """The deviation of this run from another."""
        tensors, moves = {}, {}
        for kind, arrays in other.tensors.items():
            mine = self.tensors[kind]
            tensors[kind] = {name: _relative(mine[name], arrays[name]) for name in arrays}
            if "moment" not in kind:
                moves[kind] = {
                    name: _relative(
                        mine[name].astype(np.float64) - start, arrays[name] - start.astype(float)
                    )
                    for name, start in self.weights.items()
                }
        losses = np.abs(self.losses - other.losses) / np.abs(other.losses)
        return Comparison(losses, tensors, moves)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    difference = np.linalg.norm(a.astype(np.float64) - b)
    return float(difference / np.linalg.norm(b)) if difference else 0.0


@dataclasses.dataclass(frozen=True)
class Runs:
    """A scenario's runs: ours and PyTorch's, with what both were given."""

    config: ConfigDict
    weights: Arrays
    recorded: list[Recorded]
    ours: Trajectory
    torch: Trajectory

    def arbiter(self) -> Trajectory:
        """PyTorch's run in float64."""
        return _run_torch(self.config, self.weights, self.recorded, torch.float64)

    def again(self) -> Trajectory:
        """PyTorch's run once more, for tests that change what it does."""
        return _run_torch(self.config, self.weights, self.recorded)


def run(scenario: Scenario) -> Runs:
    """Makes a scenario's runs."""
    config = scenario.config
    ours = OurRun(scenario)
    if scenario.pretrained:
        drawn = torch_model(config)
        as_if_pretrained(drawn)
        ours.start_from(drawn.state_dict())
        weights = {k: v.numpy().copy() for k, v in drawn.state_dict().items()}
    else:
        weights = from_params(jax.device_get(ours.state.params), ours.model, "official")
        # Copies, since the state's buffers are given away at the first step.
        weights = {k: v.copy() for k, v in weights.items()}
    recorded = record(config, ours.model)
    losses = np.array([ours.step(given.batch) for given in recorded])
    return Runs(
        config,
        weights,
        recorded,
        Trajectory(losses, ours.tensors(), weights),
        _run_torch(config, weights, recorded),
    )


def _run_torch(
    config: ConfigDict,
    weights: Mapping[str, np.ndarray],
    recorded: list[Recorded],
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    model = torch_model(config)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    training = Training(model.to(dtype), torch_recipe(config))
    # What a thread would be given here is less than what it costs to start it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        losses = [training.step(r.images, r.targets, r.kept) for r in recorded]
    finally:
        torch.set_num_threads(threads)
    return Trajectory(np.array(losses), training.tensors(), dict(weights))
