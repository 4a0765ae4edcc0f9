"""A plan: what a config's training step takes on a topology, as far as the compiler can tell."""

from __future__ import annotations

import dataclasses
import datetime
import time
from typing import Any

import jax

from convnext_jax.analysis.cost import PartCost, costs_by_part
from convnext_jax.analysis.exchange import Exchange, exchanges
from convnext_jax.analysis.hlo import collectives, operations
from convnext_jax.analysis.inference_cost import compiler_versions
from convnext_jax.analysis.largest_batch import LargestBatch, largest_batch
from convnext_jax.analysis.macs import count_macs, count_parameters
from convnext_jax.analysis.tpu import OutOfHbmError
from convnext_jax.analysis.tpu_chips import TpuChip
from convnext_jax.planning.memory import Memory
from convnext_jax.planning.planned_run import PlannedRun
from convnext_jax.planning.remedies import Remedy, remedies

# A step is one forward pass and a backward pass of twice its products; each multiply-accumulate is
# two operations.
_FLOPS_PER_MAC = 3 * 2


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step is expected to take on each chip.

    Attributes:
      computation: seconds, the compiler's estimated cycles at the chip's clock.
      exchange: seconds that what is exchanged takes at the full rate of the links, none of it
        hidden behind the computation; the compiler gives no estimate of it.
      parts: what the computation is made of, the costliest first.
      exchanges: what is exchanged, by kind.
      without_estimate: runs of operations that take time of which the compiler says nothing, by
        opcode. They count nothing.
      unknown_loops: loops whose length can't be read; they count as run once.
    """

    computation: float
    exchange: float
    parts: list[PartCost]
    exchanges: list[Exchange]
    without_estimate: dict[str, float]
    unknown_loops: int

    @property
    def seconds(self) -> float:
        """Computation and exchange, one after the other."""
        return self.computation + self.exchange


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology.

    Attributes:
      model: its name.
      image_size: in pixels.
      parameters: scalars.
      macs: multiply-accumulates of one image's forward pass.
      topology: "v5e:16x16".
      chips: in it.
      hosts: that they hang on.
      chip: their type.
      mesh: devices by axis.
      batch_size: global.
      accumulation_steps: micro-batches that it is dealt out to.
      remat: whether activations are computed again in the backward pass, or by which policy.
      examples: of the training set.
      steps: of the whole schedule.
      fits: whether the compiler took the step, and left room for the batches that wait.
      refusal: what the compiler said, where it refused.
      memory: of each chip. Of what was refused, temporaries are all that is not known to be else.
      step: None where the compiler refused.
      largest: images a chip; None where it was not asked for.
      remedies: where it does not fit, what would help.
      versions: of what compiled it.
      date: of the compilation, YYYY-MM-DD.
      compile_seconds: that the first compilation took.
    """

    model: str
    image_size: int
    parameters: int
    macs: int
    topology: str
    chips: int
    hosts: int
    chip: TpuChip
    mesh: dict[str, int]
    batch_size: int
    accumulation_steps: int
    remat: bool | str
    examples: int
    steps: int
    fits: bool
    refusal: str | None
    memory: Memory
    step: StepCost | None
    largest: LargestBatch | None
    remedies: list[Remedy]
    versions: dict[str, str]
    date: str
    compile_seconds: float

    @property
    def images_on_each(self) -> int:
        """Images of a batch on each chip."""
        return self.batch_size // self.chips

    @property
    def images_per_second(self) -> float | None:
        """Of each chip."""
        return None if self.step is None else self.images_on_each / self.step.seconds

    @property
    def mfu(self) -> float | None:
        """The model's products, as a share of what the chip could do at its peak."""
        rate = self.images_per_second
        return None if rate is None else rate * _FLOPS_PER_MAC * self.macs / self.chip.peak_flops

    @property
    def hours(self) -> float | None:
        """Of the whole schedule, without evaluations, checkpoints and waiting for data."""
        return None if self.step is None else self.steps * self.step.seconds / 3600

    def as_json(self) -> dict[str, Any]:
        """All of it and what is derived from it, for `json.dumps`."""
        derived = {name: getattr(self, name) for name in ("images_per_second", "mfu", "hours")}
        result = dataclasses.asdict(self) | derived
        result["memory"]["total"] = self.memory.total
        if self.step is not None:
            result["step"]["seconds"] = self.step.seconds
        return result


def make_plan(
    run: PlannedRun, *, find_largest: bool = False, compile_remedies: bool = True
) -> Plan:
    """Compiles a run's training step, and reads what the compiler says of it.

    Args:
      run: a config laid out on a topology.
      find_largest: look for the largest batch that fits, by some more compilations.
      compile_remedies: where the step does not fit, compile it once more with rematerialisation.

    Returns:
      The plan. A compilation takes minutes.
    """
    config, topology = run.config, run.topology
    chip, each = topology.chip, run.images_on_each
    start = time.monotonic()
    step, refusal, memory = None, None, run.memory(each)
    try:
        compiled = run.compile(each)
    except OutOfHbmError as error:
        refusal = error.text
        if error.needed is not None:
            memory = memory.with_total(error.needed + memory.waiting)
    else:
        memory = memory.with_program(compiled)
        step = read_step(compiled, chip)
    compile_seconds = time.monotonic() - start
    fits = step is not None and memory.total <= chip.usable_hbm_bytes

    largest = None
    if find_largest:
        unknown = refusal is not None and memory.temporaries == 0

        def needed(images: int) -> int | None:
            if images == each:
                return None if unknown else memory.total
            return run.needed(images)

        largest = largest_batch(
            needed,
            chip.usable_hbm_bytes,
            start=each,
            unit=config.optim.accumulation_steps,
            fixed=memory.fixed,
        )
    return Plan(
        model=config.model.name,
        image_size=config.data.image_size,
        parameters=count_parameters(run.model, config.data.image_size),
        macs=count_macs(run.model, config.data.image_size),
        topology=topology.name,
        chips=run.chips,
        hosts=topology.hosts,
        chip=chip,
        mesh=dict(run.mesh.shape),
        batch_size=config.batch_size,
        accumulation_steps=config.optim.accumulation_steps,
        remat=config.model.remat,
        examples=run.examples,
        steps=run.durations.total,
        fits=fits,
        refusal=refusal,
        memory=memory,
        step=step,
        largest=largest,
        remedies=[]
        if fits
        else remedies(run, memory, chip.usable_hbm_bytes, compiling=compile_remedies),
        versions=compiler_versions(),
        date=datetime.date.today().isoformat(),
        compile_seconds=compile_seconds,
    )


def read_step(compiled: jax.stages.Compiled, chip: TpuChip) -> StepCost:
    """What the compiler says of the time that a compiled training step takes.

    Args:
      compiled: the step, for a TPU.
      chip: its type.

    Returns:
      The estimates.
    """
    program = operations(compiled.as_text() or "")
    exchanged = exchanges(collectives(program))
    without: dict[str, float] = {}
    for one in program:
        if not one.known and one.opcode != "while":
            without[one.opcode] = without.get(one.opcode, 0.0) + one.runs
    return StepCost(
        computation=sum(one.total_cycles for one in program) / chip.clock,
        exchange=sum(exchange.seconds(chip.ici_bandwidth) for exchange in exchanged),
        parts=costs_by_part(program),
        exchanges=exchanged,
        without_estimate=without,
        unknown_loops=sum(one.opcode == "while" and not one.known for one in program),
    )
