"""How a model does on each single example of a data set.

`training.evaluation` keeps sums on the devices, which is all that a run in training wants. Here
what each example came to is kept: for accuracies by class, for confusions, for intervals.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convnext_jax import compiler_options
from convnext_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from convnext_jax.training.sharding import batch_sharding, replicated, traced_over

PyTree = Any
Batch = dict[str, jax.Array]
ScoreStep = Callable[[PyTree, Batch], dict[str, jax.Array]]

# Steps whose results are not fetched yet; see `score`.
_STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Scores:
    """What each of N examples came to, in no order that means anything.

    Attributes:
      label: int32 (N,), the example's class in the data set's numbering.
      prediction: int32 (N,), the model's answer in its own numbering; of equals a wrong one.
      rank: int32 (N,), how many wrong answers score at least as high as the best right one: 0 for a
        hit, below 5 for a hit among five.
      loss: float32 (N,), minus the logarithm of the probability given to the right answers.
    """

    label: np.ndarray
    prediction: np.ndarray
    rank: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @property
    def top1(self) -> np.ndarray:
        """Bool (N,)."""
        return self.rank < 1

    @property
    def top5(self) -> np.ndarray:
        """Bool (N,)."""
        return self.rank < 5


def make_score_step(
    model: nn.Module,
    *,
    answers: np.ndarray | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> ScoreStep:
    """Makes the step that scores each example of a batch.

    Args:
      model: called as `model.apply(variables, images, train=False)`, it returns logits (B, K).
      answers: bool (K,), the classes among which the model chooses; all by default.
      mean: of the images, in units of [0, 1].
      std: of the images, in units of [0, 1].

    Returns:
      A function (variables, batch) → "prediction" int32 (B,), "rank" int32 (B,) and "loss" float32
      (B,), see `Scores`, and the batch's own "label" and "mask". The batch holds "image", uint8 (B,
      H, W, C), "target", bool (B, K), True for the right answers, "label", int32 (B,), which is
      only passed on, and "mask", float32 (B,). Where an example has no right answer among
      `answers` its rank is their number and its loss infinite.
    """

    def score_step(variables: PyTree, batch: Batch) -> dict[str, jax.Array]:
        images = normalize(batch["image"], mean, std)
        outputs: Any = model.apply(variables, images, train=False)
        logits = outputs.astype(jnp.float32)
        allowed = jnp.ones(logits.shape[-1], bool) if answers is None else jnp.asarray(answers)
        allowed = allowed[None, :]
        right = batch["target"] & allowed
        wrong = ~batch["target"] & allowed
        among = jnp.where(allowed, logits, -jnp.inf)
        wrongly = jnp.where(wrong, logits, -jnp.inf)
        best = jnp.where(right, logits, -jnp.inf).max(axis=-1, keepdims=True)
        # Ties, and NaN, count against the model, as in training.step: a dead one scores no hit.
        rank = (wrong & ~(logits < best)).sum(axis=-1)
        log_right = jax.nn.logsumexp(jnp.where(right, logits, -jnp.inf), axis=-1)
        return {
            "prediction": jnp.where(
                rank < 1, jnp.argmax(among, axis=-1), jnp.argmax(wrongly, axis=-1)
            ).astype(jnp.int32),
            "rank": rank.astype(jnp.int32),
            "loss": jax.nn.logsumexp(among, axis=-1) - log_right,
            "label": batch["label"],
            "mask": batch["mask"],
        }

    return score_step


def jit_score_step(score_step: ScoreStep, mesh: Mesh) -> Any:
    """Compiles it for a mesh: variables whole on every device, batches cut, results everywhere."""

    def on_mesh(variables: PyTree, batch: Batch) -> dict[str, jax.Array]:
        with traced_over(mesh):
            return score_step(variables, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options.for_network(mesh),
    )


def score(
    score_step: ScoreStep,
    variables: PyTree,
    batches: Iterable[Batch],
    *,
    progress: Callable[[Scores], None] = lambda _: None,
) -> Scores:
    """Scores every example that its batch's mask counts.

    Args:
      score_step: from `make_score_step`, compiled.
      variables: the model's, {"params": …} and whatever else it has.
      batches: global batches; the same number on every process.
      progress: called with each batch's scores as they come in.

    Returns:
      The scores of all examples, on every process.
    """
    parts: list[Scores] = []
    pending: collections.deque[Mapping[str, jax.Array]] = collections.deque()

    def fetch() -> None:
        found: Any = jax.device_get(pending.popleft())
        counted = found.pop("mask") > 0
        parts.append(Scores(**{name: values[counted] for name, values in found.items()}))
        progress(parts[-1])

    # Fetching a result waits for its step, so the newest ones stay with the devices: they would
    # have nothing to do meanwhile.
    for batch in batches:
        pending.append(score_step(variables, batch))
        if len(pending) > _STEPS_IN_FLIGHT:
            fetch()
    while pending:
        fetch()
    return Scores(
        *(
            np.concatenate([getattr(part, field.name) for part in parts] or [np.zeros(0, np.int32)])
            for field in dataclasses.fields(Scores)
        )
    )
