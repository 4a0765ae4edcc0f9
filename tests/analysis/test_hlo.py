"""Reading the compiler's text: cycles, loops, collectives."""

import pytest

from convnext_jax.analysis.hlo import collectives, operations

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TEXT = f"""HloModule jit_step, is_scheduled=true

%fused_computation (param_0: bf16[8,16]) -> bf16[8,16] {{
  %param_0 = bf16[8,16]{{1,0}} parameter(0)
  ROOT %inner = bf16[8,16]{{1,0}} multiply(%param_0, %param_0), {CYCLES % 7777}
}}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %p = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %work = bf16[8,16]{{1,0:T(8,128)(2,1)}} fusion(%p), kind=kLoop, calls=%fused_computation, \
metadata={{op_name="jit(step)/while/body/mul"}}, {CYCLES % 100}
  ROOT %tuple = (s32[], bf16[8,16]{{1,0}}) tuple(%p, %work)
}}

%condition (p.1: (s32[], bf16[8,16])) -> pred[] {{
  %p.1 = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  ROOT %less = pred[] compare(%p.1, %p.1), direction=LT
}}

ENTRY %main (x: bf16[8,16]) -> f32[8] {{
  %x = bf16[8,16]{{1,0}} parameter(0)
  %loop = (s32[], bf16[8,16]{{1,0}}) while(%x), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
  %open = (s32[], bf16[8,16]{{1,0}}) while(%x), condition=%condition, body=%body
  %start = (f32[8]{{0}}, f32[8]{{0}}) all-reduce-start(%loop), replica_groups={{}}
  %done = f32[8]{{0}} all-reduce-done(%start)
  ROOT %gather = (pred[3], f32[8,2]{{1,0}}) all-gather(%done), dimensions={{0}}
}}
"""


def test_a_loop_counts_as_often_as_it_runs_and_a_fusion_once():
    program = operations(TEXT)
    work = [op for op in program if op.name == "work"]
    assert [(op.cycles, op.runs) for op in work] == [(100, 5), (100, 1)]
    assert sum(op.cycles * op.runs for op in program) == 600
    assert work[0].source == "jit(step)/while/body/mul"
    assert work[0].result_bytes == 8 * 16 * 2
    assert "inner" not in {op.name for op in program}


def test_collectives_count_once_with_their_bytes():
    found = collectives(operations(TEXT))
    assert [(op.opcode, op.result_bytes) for op in found] == [
        ("all-reduce-start", 64),
        ("all-gather", 3 + 64),
    ]


def test_a_text_without_an_entry():
    with pytest.raises(ValueError, match="no ENTRY"):
        operations("HloModule nothing\n")
