"""A plan as a page for one topology, and as a table for several."""

from __future__ import annotations

from collections.abc import Sequence

from convnext_jax.planning.planner import Plan, StepCost
from convnext_jax.training.console import block

_COSTLIEST = 10


def page(plan: Plan) -> str:
    """All that is known of a run on one topology, for a person to read."""
    per_chip = f"{plan.images_on_each} a chip"
    if plan.accumulation_steps > 1:
        per_chip += f" in {plan.accumulation_steps} micro-batches"
    mesh = ", ".join(f"{axis} {length}" for axis, length in plan.mesh.items())
    sections = {
        f"{plan.model} on {plan.topology}": {
            "chips": f"{plan.chips} on {plan.hosts} host{'s'[: plan.hosts > 1]}; mesh {mesh}",
            "parameters": f"{plan.parameters:,}",
            "MACs": f"{plan.macs / 1e9:.3f} G an image of {plan.image_size} × {plan.image_size}",
            "batch": f"{plan.batch_size:,}, {per_chip}"
            + (", activations rematerialised" if plan.remat else ""),
            "schedule": f"{plan.steps:,} steps; {plan.examples:,} images an epoch",
        },
        "memory of each chip": _memory_section(plan),
    }
    if plan.step is not None:
        sections["time of a step, estimated"] = _time_section(plan, plan.step)
    text = block(sections)
    if plan.remedies:
        text += "\n\n" + _remedies(plan)
    if plan.refusal is not None:
        text += f"\n\nthe compiler said: {plan.refusal.splitlines()[0]}"
    if plan.step is not None:
        text += "\n\n" + _parts(plan.step) + "\n\n" + _exchanges(plan, plan.step)
        text += "\n\n" + _caveats(plan.step)
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return f"{text}\n\ncompiled on {plan.date} by {versions}; estimates, no measurements"


def table(plans: Sequence[Plan]) -> str:
    """Several plans side by side, as a Markdown table."""
    rows = [
        "| model | topology | batch a chip | memory a chip | fits | step | images/s/chip | MFU "
        "| hours | largest batch a chip |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        memory = f"{_gib(plan.memory.total)} of {_gib(plan.chip.usable_hbm_bytes)}"
        cells = [plan.model, plan.topology, str(plan.images_on_each), memory]
        cells.append("yes" if plan.fits else "no")
        if plan.step is None:
            cells += ["", "", "", ""]
        else:
            cells += [
                f"{plan.step.seconds * 1e3:,.1f} ms",
                f"{plan.images_per_second:,.0f}",
                f"{plan.mfu:.1%}",
                f"{plan.hours:,.1f}",
            ]
        cells.append("" if plan.largest is None else f"{plan.largest.images:,}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _memory_section(plan: Plan) -> dict[str, str]:
    memory, capacity = plan.memory, plan.chip.usable_hbm_bytes
    rest = "temporaries" if plan.step is not None else "temporaries and the rest"
    kinds = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "average (EMA)": memory.average,
        "batch": memory.batch,
        "batches that wait": memory.waiting,
        "padding of these": memory.padding,
        rest: memory.temporaries,
        "program and results": memory.program,
    }
    section = {name: _gib(size) for name, size in kinds.items() if size}
    share = memory.total / capacity
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.refusal is not None and not memory.temporaries:
        section["together"] = f"more than {_gib(capacity)}, DOES NOT FIT"
    else:
        section["together"] = f"{_gib(memory.total)} of {_gib(capacity)} ({share:.0%}), {verdict}"
    if plan.largest is not None:
        largest = plan.largest
        text = f"{largest.images} images a chip, {_gib(largest.needed)}"
        if not largest.images:
            text = "none"
        if largest.refused is not None:
            text += f"; {largest.refused} do not fit"
        section["largest batch"] = text
    return section


def _time_section(plan: Plan, step: StepCost) -> dict[str, str]:
    return {
        "computation": f"{step.computation * 1e3:.2f} ms, the compiler's cycles at "
        f"{plan.chip.clock / 1e9:.2f} GHz",
        "exchange": f"{step.exchange * 1e3:.2f} ms, its bytes at "
        f"{plan.chip.ici_bandwidth / 1e9:.0f} GB/s, none of it hidden",
        "together": f"{step.seconds * 1e3:.2f} ms",
        "images/s": f"{plan.images_per_second:,.0f} a chip, "
        f"{(plan.images_per_second or 0) * plan.chips:,.0f} in all",
        "MFU": f"{plan.mfu:.1%} of {plan.chip.peak_flops / 1e12:.0f} bfloat16 TFLOP/s; "
        "3 × 2 × MACs × images",
        "whole schedule": f"{plan.hours:,.1f} h without evaluation, checkpoints and waiting",
    }


def _parts(step: StepCost) -> str:
    total = sum(part.cycles for part in step.parts)
    shown = step.parts[:_COSTLIEST]
    lines = [f"the {len(shown)} costliest parts, share of the computation"]
    for part in shown:
        name = f"{part.part} {part.direction}".rstrip()
        lines.append(f"  {part.cycles / total:6.1%}  {name:<32}{part.operations:6,} operations")
    rest = step.parts[_COSTLIEST:]
    if rest:
        share = sum(part.cycles for part in rest) / total
        lines.append(f"  {share:6.1%}  {len(rest)} others")
    return "\n".join(lines)


def _exchanges(plan: Plan, step: StepCost) -> str:
    if not step.exchanges:
        return "nothing is exchanged"
    lines = ["exchanged in a step, bytes of the whole arrays"]
    for one in step.exchanges:
        least = one.seconds(plan.chip.ici_bandwidth)
        lines.append(
            f"  {one.kind:<20}{one.count:5,.0f} ×  {one.bytes / 1e6:10,.2f} MB  "
            f"{least * 1e3:8.3f} ms at least"
        )
    return "\n".join(lines)


def _remedies(plan: Plan) -> str:
    capacity = plan.chip.usable_hbm_bytes
    lines = [f"what would help, each by itself, to {_gib(capacity)} a chip"]
    for remedy in plan.remedies:
        needed = "" if remedy.needed is None else _gib(remedy.needed)
        verdict = {True: "fits", False: "still too much", None: "may be enough"}[remedy.fits]
        lines.append(f"  {remedy.change:<42}{needed:>12}  {verdict} ({remedy.basis})")
    return "\n".join(lines)


def _caveats(step: StepCost) -> str:
    lines = [
        "branches of the augmentation count as taken alike often; asynchronous copies count nothing"
    ]
    if step.unknown_loops:
        lines.append(f"{step.unknown_loops} loops of unknown length count as run once")
    count = sum(step.without_estimate.values())
    if count:
        kinds = ", ".join(f"{runs:,.0f} {kind}" for kind, runs in step.without_estimate.items())
        lines.append(f"{count:,.0f} operations without estimate count nothing: {kinds}")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"
