"""One config trained by this library and by the PyTorch loop of tests/parity, for fidelity.py.

Both are given the same batches, those of the config's own loader, step by step. Each starts from
weights of its own, drawn with the run's seed.
"""

import contextlib
import sys
import time
from pathlib import Path

import jax
import numpy as np

from convnext_jax import experiment
from convnext_jax.data.augment import normalize
from convnext_jax.data.loader import eval_loader, train_loader
from convnext_jax.data.mixing import smooth_one_hot
from convnext_jax.training import sharding
from convnext_jax.training.evaluation import evaluate
from convnext_jax.training.state import abstract_state, create_state
from convnext_jax.training.step import jit_eval_step, jit_train_step, make_eval_step

PARITY = Path(__file__).resolve().parents[1] / "tests" / "parity"


class Data:
    """A config's data: its sources, and what the loaders make of them."""

    def __init__(self, config):
        self.config = config
        self.source = experiment.open_train_source(config)
        self.eval_source = experiment.open_eval_source(config, self.source)
        self.steps = experiment.durations(config, len(self.source))

    def train(self):
        """The batches of the whole run."""
        return contextlib.closing(
            train_loader(
                self.source,
                experiment.train_transform(self.config),
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                start_step=0,
                num_steps=self.steps.total,
            )
        )

    def held_out(self):
        """The evaluation's batches."""
        return contextlib.closing(
            eval_loader(
                self.eval_source,
                experiment.eval_transform(self.config),
                batch_size=self.config.eval_batch_size,
            )
        )


def train_ours(config):
    """Trains by the step that `train.py` runs, on one device.

    Returns:
      "losses" of every step, "accuracy" on what is held out, "ema_accuracy" where an average is
      kept, and "seconds" per step without the first.
    """
    data = Data(config)
    mesh = sharding.create_mesh(1, 1, jax.devices()[:1])
    model = experiment.build_model(config, data.source.num_classes, mesh.size)
    optimizer, schedule = experiment.build_optimizer(config, model, data.steps)
    shape = (config.data.image_size, config.data.image_size, 3)
    ema = config.ema_decay is not None
    abstract = abstract_state(model, optimizer, shape, mesh, ema=ema)
    state = create_state(model, optimizer, shape, mesh, seed=config.seed, ema=ema)
    step = jit_train_step(
        experiment.build_train_step(config, model, optimizer, schedule, mesh), abstract, mesh
    )
    rows = sharding.batch_sharding(mesh)
    losses = []
    with data.train() as batches:
        for batch in sharding.prefetch_to_device(batches, rows, ("image", "label")):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if len(losses) == 1:
                started = time.perf_counter()
    seconds = (time.perf_counter() - started) / max(len(losses) - 1, 1)
    mean, std = tuple(config.augment.mean), tuple(config.augment.std)
    eval_step = jit_eval_step(make_eval_step(model, mean=mean, std=std), abstract, mesh)
    with data.held_out() as batches:
        fields = ("image", "label", "mask")
        found = evaluate(
            eval_step,
            state.variables,
            sharding.prefetch_to_device(batches, rows, fields),
            state.ema_variables,
        )
    kept = {name: found[name] for name in ("accuracy", "ema_accuracy") if name in found}
    return {"losses": losses, "seconds": seconds, **kept}


def train_torch(config):
    """Trains by PyTorch on the same batches; without mixing, stochastic depth and average.

    Returns:
      As `train_ours`.
    """
    sys.path.insert(0, str(PARITY))
    import torch
    from torch_convnext import ConvNeXt
    from torch_training import Recipe, Training

    assert config.model.drop_path_rate == config.mix.prob == 0
    # Threads that wait for each other turn on a small network's every operation.
    torch.set_num_threads(1)
    data = Data(config)
    overrides, optim = config.model.overrides, config.optim
    torch.manual_seed(config.seed)
    model = ConvNeXt(
        data.source.num_classes, overrides.depths, overrides.dims, patch_size=overrides.patch_size
    )
    training = Training(
        model,
        Recipe(
            learning_rate=optim.learning_rate,
            min_learning_rate=optim.min_learning_rate,
            warmup_steps=data.steps.warmup,
            total_steps=data.steps.total,
            weight_decay=optim.weight_decay,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
        ),
    )
    mean, std = tuple(config.augment.mean), tuple(config.augment.std)

    @jax.jit
    def prepare(batch):
        targets = smooth_one_hot(
            batch["label"], data.source.num_classes, config.mix.label_smoothing
        )
        return normalize(batch["image"], mean, std), targets

    losses = []
    with data.train() as batches:
        for batch in batches:
            images, targets = jax.device_get(prepare({k: batch[k] for k in ("image", "label")}))
            losses.append(training.step(np.asarray(images), np.asarray(targets), None))
            if len(losses) == 1:
                started = time.perf_counter()
    seconds = (time.perf_counter() - started) / max(len(losses) - 1, 1)
    right = count = 0
    model.eval()
    with data.held_out() as batches, torch.no_grad():
        for batch in batches:
            images = np.asarray(normalize(batch["image"], mean, std)).transpose(0, 3, 1, 2)
            answers = model(torch.from_numpy(images.copy())).argmax(-1).numpy()
            right += int(((answers == batch["label"]) * batch["mask"]).sum())
            count += int(batch["mask"].sum())
    return {"losses": losses, "seconds": seconds, "accuracy": right / count}
