"""Sums of what is exchanged, and the time that it takes at least."""

import pytest

from convnext_jax.analysis.exchange import exchanges
from convnext_jax.analysis.hlo import Operation


def collective(opcode, size, runs=1.0):
    return Operation("op", opcode, "", 0, runs, size)


def test_kinds_are_summed_and_an_all_reduce_is_sent_twice():
    found = exchanges(
        [
            collective("all-gather", 100),
            collective("all-reduce-done", 300, runs=2.0),
            collective("all-reduce", 10),
        ]
    )
    assert [(one.kind, one.count, one.bytes) for one in found] == [
        ("all-reduce", 3, 610),
        ("all-gather", 1, 100),
    ]
    assert [one.seconds(1000) for one in found] == pytest.approx([1.22, 0.1])
