"""Which checkpoints stay: the newest ones, and the best."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp


@dataclasses.dataclass
class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps and the one with the highest score; of equals the newest.

    Attributes:
      newest: how many of the newest.
      scores: by step, looked at anew each time; steps without one are never the best.
    """

    newest: int
    scores: Mapping[int, float]

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: Any,
    ) -> Sequence[bool]:
        """Whether each checkpoint stays, as Orbax asks."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = set(sorted(steps)[-self.newest :])
        ranked = [step for step in steps if step in self.scores]
        if ranked:
            keep.add(max(ranked, key=lambda step: (self.scores[step], step)))
        return [step in keep for step in steps]
