"""What would make a step fit that does not, and by how much."""

from __future__ import annotations

import dataclasses

from convnext_jax.planning.memory import Memory, bytes_on_each
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.training.sharding import create_mesh


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of the config.

    Attributes:
      change: as the command line writes it.
      needed: bytes on each chip with it; None where that is not known.
      fits: whether that is little enough; None where that is not known.
      basis: how the figure was come by.
    """

    change: str
    needed: int | None
    fits: bool | None
    basis: str


def remedies(run: PlannedRun, memory: Memory, capacity: int, *, compiling: bool) -> list[Remedy]:
    """Looks for what would help.

    Args:
      run: whose step does not fit.
      memory: what it takes; without temporaries where the compiler gave no figure.
      capacity: bytes of each chip that it may take.
      compiling: whether to compile once more, with rematerialisation, to know its figure.

    Returns:
      The changes, each by itself.
    """

    def by_reckoning(change: str, needed: int, basis: str) -> Remedy:
        return Remedy(change, needed, needed <= capacity, basis)

    config, each = run.config, run.images_on_each
    found = []
    if compiling and not config.model.remat:
        needed = run.needed(each, remat=True)
        fits = needed is not None and needed <= capacity
        found.append(Remedy("--config.model.remat=true", needed, fits, "compiled"))

    state = memory.parameters + memory.optimizer + memory.average
    axes = [2**n for n in range(1, 10) if run.chips % 2**n == 0 and 2**n > run.mesh.shape["fsdp"]]
    for fsdp in axes:
        cut = bytes_on_each(run.state(create_mesh(-1, fsdp, run.topology.devices)))
        needed = memory.total - state + cut
        if needed <= capacity or fsdp == axes[-1]:
            change = f"--config.mesh.fsdp={fsdp}"
            basis = f"the state's share is {cut / 2**30:.2f} GiB instead of {state / 2**30:.2f}"
            if memory.temporaries:
                found.append(by_reckoning(change, needed, basis))
            else:
                found.append(Remedy(change, None, None, basis))
            break
    if not memory.temporaries:
        return found

    # Temporaries are nearly in proportion to the images that are worked on at a time.
    now = config.optim.accumulation_steps
    rest = memory.total - memory.temporaries
    for steps in range(now + 1, each + 1):
        # The gradients of the micro-batches are added up in float32.
        needed = round(rest + memory.parameters + memory.temporaries * now / steps)
        if each % steps == 0 and (needed <= capacity or steps == each):
            change = f"--config.optim.accumulation_steps={steps}"
            found.append(by_reckoning(change, needed, "by proportion"))
            break
    by_image = memory.batch + memory.waiting + memory.temporaries
    for images in range(each - 1, 0, -1):
        needed = round(memory.total - by_image + by_image * images / each)
        if images % now == 0 and needed <= capacity:
            change = f"--config.batch_size={images * run.chips}"
            found.append(by_reckoning(change, needed, f"{images} images a chip; by proportion"))
            break
    return found
