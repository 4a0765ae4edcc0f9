"""From a config to the objects that it describes; programs and tests alike build them here."""

from convnext_jax.experiment.augmentation import build_augmentation, build_mixing
from convnext_jax.experiment.evaluation import build_evaluation
from convnext_jax.experiment.images import (
    check_identity,
    eval_batches,
    eval_image_size,
    eval_transform,
    open_eval_source,
    open_train_source,
    train_batches,
    train_transform,
)
from convnext_jax.experiment.initial_weights import check_init_from, find_initial_weights
from convnext_jax.experiment.network import build_model, check_kernels
from convnext_jax.experiment.optimization import build_loss, build_optimizer
from convnext_jax.experiment.run_length import Durations, durations
from convnext_jax.experiment.step import build_train_step, check_batch_sizes

__all__ = [
    "Durations",
    "build_augmentation",
    "build_evaluation",
    "build_loss",
    "build_mixing",
    "build_model",
    "build_optimizer",
    "build_train_step",
    "check_batch_sizes",
    "check_identity",
    "check_init_from",
    "check_kernels",
    "durations",
    "eval_batches",
    "eval_image_size",
    "eval_transform",
    "find_initial_weights",
    "open_eval_source",
    "open_train_source",
    "train_batches",
    "train_transform",
]
