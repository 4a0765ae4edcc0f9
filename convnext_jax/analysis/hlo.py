"""What the TPU compiler expects of each operation of a program, read from its optimised HLO text.

The compiler writes its own cost model's "estimated_cycles" beside most operations. An operation
stands in the text once, however often it runs. So loops are counted by the trips that their
condition and counter imply, and the branches of a conditional as if each were taken alike often.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from convnext_jax.analysis.hlo_text import Computation, Instruction, Module, parse
from convnext_jax.analysis.loops import trip_count

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# These cost nothing, or what they cost is that of what they call.
_FREE = ("after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple")
_CALLS = ("call", "conditional", "while")
# Custom calls that only name memory.
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")

_START_TARGET = "AsyncCollectiveStart"

# One vector register, 8 × 128 words of 4 bytes: smaller results are the work of a few cycles.
_NEGLIGIBLE = 4096


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the compiled program.

    Attributes:
      name: as the compiler calls it.
      opcode: "fusion", "all-reduce", …
      source: the JAX operation that it came from, "jit(train_step)/…/dot_general", or "". Of a
        fusion it is that of one operation in it, mostly the last.
      cycles: estimated, of one run; 0 where the compiler gives none.
      runs: how often it runs in the program: loops by their trips, branches by their share.
      result_bytes: size of what it produces; of a collective, that of the whole array.
      files: the Python files of the source's call stack, innermost first; () where unknown.
      known: False where the figures lack something: an operation takes time and has no estimate,
        or a loop's length can't be read and it counts as run once. What fills no more than a
        register, and copies that run beside the computation, are taken to take none.
    """

    name: str
    opcode: str
    source: str
    cycles: int
    runs: float
    result_bytes: int
    files: tuple[str, ...] = ()
    known: bool = True

    @property
    def total_cycles(self) -> float:
        """Estimated cycles of all its runs."""
        return self.cycles * self.runs


def operations(text: str) -> list[Operation]:
    """All that runs when a program does.

    Args:
      text: of `compiled.as_text()`, compiled for a TPU.

    Returns:
      The instructions in the order of the calls from the entry, those within a fusion left out,
      since its estimate is theirs; collectives within it are listed, without cycles.

    Raises:
      ValueError: if the text has no entry computation.
    """
    module = parse(text)
    return list(_walk(module, module.entry, 1.0))


def collectives(program: Iterable[Operation]) -> list[Operation]:
    """Those that exchange data between devices; of an asynchronous pair the one that ends it."""
    return [one for one in program if one.opcode.removesuffix("-done") in COLLECTIVES]


def _walk(module: Module, name: str, runs: float) -> Iterator[Operation]:
    computation = module.computations[name]
    for one in computation.values():
        called = one.attributes
        if one.opcode == "while":
            condition, body = called["condition"], called["body"]
            trips = trip_count(
                one, computation, module.computations[condition], module.computations[body]
            )
            yield _operation(module, one, runs, known=trips is not None)
            yield from _walk(module, condition, runs * (1 if trips is None else trips + 1))
            yield from _walk(module, body, runs * (1 if trips is None else trips))
            continue
        if one.opcode.removesuffix("-done") in COLLECTIVES:
            whole = _whole_bytes(one, computation)
            yield _operation(module, one, runs, known=True, result_bytes=whole)
            continue
        yield _operation(module, one, runs, known=_is_known(one))
        if one.opcode == "conditional":
            branches = [value for key, value in called.items() if key.endswith("_computation")]
            branches += called.get("branch_computations", "").split(",")
            branches = [branch for branch in branches if branch]
            for branch in branches:
                yield from _walk(module, branch, runs / len(branches))
        elif one.opcode == "call":
            yield from _walk(module, called["to_apply"], runs)
        elif one.opcode == "async-start":
            yield from _walk(module, called["calls"], runs)
        elif one.opcode == "fusion":
            yield from _collectives_within(module, one, runs)


def _collectives_within(module: Module, fusion: Instruction, runs: float) -> Iterator[Operation]:
    name = fusion.attributes.get("calls", "")
    computation = module.computations.get(name, {})
    targets = {one.attributes.get("custom_call_target") for one in computation.values()}
    for one in computation.values():
        if one.opcode.removesuffix("-done") not in COLLECTIVES:
            continue
        # To run beside other work, one is spread over several fusions; the first one starts it.
        if "chain_id" in one.rest and _START_TARGET not in targets:
            continue
        whole = _whole_bytes(one, computation)
        found = _operation(module, one, runs, known=True, result_bytes=whole)
        # A TPU's reduce-scatter is an all-reduce fused with the slice that a device keeps.
        opcode = "reduce-scatter" if name.startswith("all-reduce-scatter") else one.opcode
        yield dataclasses.replace(found, opcode=opcode, cycles=0)


def _operation(
    module: Module, one: Instruction, runs: float, *, known: bool, result_bytes: int | None = None
) -> Operation:
    cycles = _CYCLES.search(one.rest)
    frame = one.frame
    return Operation(
        name=one.name,
        opcode=one.opcode,
        source=one.source,
        cycles=int(cycles[1]) if cycles else 0,
        runs=runs,
        result_bytes=one.result_bytes if result_bytes is None else result_bytes,
        files=() if frame is None else module.files.get(frame, ()),
        known=known,
    )


def _is_known(one: Instruction) -> bool:
    return (
        _CYCLES.search(one.rest) is not None
        or one.opcode in _FREE + _CALLS
        or one.opcode.endswith(("-start", "-done"))
        or one.attributes.get("custom_call_target") in _FREE_TARGETS
        or (one.result_bytes <= _NEGLIGIBLE and one.opcode != "custom-call")
    )


def _whole_bytes(one: Instruction, computation: Computation) -> int:
    """The whole array's size: what a reduce-scatter takes in, and what an all-gather gives."""
    if one.opcode.endswith("-done"):
        return one.result_bytes
    operands = (computation[name] for name in one.operands if name in computation)
    return max(one.result_bytes, sum(operand.result_bytes for operand in operands))
