"""Reading the compiler's text: cycles, loops, branches, collectives, places in the source."""

import pytest

from convnext_jax.analysis.hlo import collectives, operations

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
HEAD = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/run.py"
2 "/lib/convnext_jax/training/step.py"
3 "/lib/convnext_jax/data/mixing.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

"""


def total(program):
    return sum(one.total_cycles for one in program)


def loop(start="0", step="1", limit="5", direction="LT", init="copy", backend_config=""):
    """A program that works once for each turn of one loop, as the TPU compiler writes it."""
    return f"""{HEAD}
%fused (param_0: bf16[64,128]) -> bf16[64,128] {{
  %param_0 = bf16[64,128]{{1,0}} parameter(0)
  ROOT %inner = bf16[64,128]{{1,0}} multiply(%param_0, %param_0), {CYCLES % 7777}
}}

%body (p: (bf16[64,128], s32[])) -> (bf16[64,128], s32[]) {{
  %p = (bf16[64,128]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %x = bf16[64,128]{{1,0}} get-tuple-element(%p), index=0
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=1
  %i.copy = s32[]{{:T(128)S(6)}} copy(%i), backend_config={{"flag_configs":[]}}
  %work = bf16[64,128]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%fused, \
metadata={{op_name="jit(step)/while/body/mul" stack_frame_id=3}}, {CYCLES % 100}
  %step = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%i.copy, %step), metadata={{op_name="jit(step)/while/body/add"}}
  ROOT %tuple = (bf16[64,128]{{1,0}}, s32[]{{:T(128)}}) tuple(%work, %next)
}}

%condition (p.1: (bf16[64,128], s32[])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant({limit})
  %p.1 = (bf16[64,128]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=1
  ROOT %less = pred[]{{:T(512)}} compare(%i.1, %limit), direction={direction}
}}

ENTRY %main (x.1: bf16[64,128]) -> bf16[64,128] {{
  %x.1 = bf16[64,128]{{1,0}} parameter(0)
  %start = s32[]{{:T(128)}} constant({start})
  %copy = s32[]{{:T(128)}} copy(%start)
  %other = s32[]{{:T(128)}} custom-call(%x.1), custom_call_target="Draw", {CYCLES % 1}
  %init = (bf16[64,128]{{1,0}}, /*index=1*/s32[]{{:T(128)}}) tuple(%x.1, /*index=1*/%{init})
  %loop = (bf16[64,128]{{1,0}}, s32[]{{:T(128)}}) while(%init), condition=%condition, \
body=%body, metadata={{op_name="jit(step)/while"}}{backend_config}
  ROOT %result = bf16[64,128]{{1,0}} get-tuple-element(%loop), index=0
}}
"""


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        ({}, 5),
        ({"limit": "6", "start": "2"}, 4),
        ({"step": "2"}, 3),
        ({"direction": "LE"}, 6),
        ({"start": "9"}, 0),
        ({"backend_config": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
)
def test_a_loop_runs_as_often_as_its_counter_says(arguments, runs):
    program = operations(loop(**arguments))
    (work,) = (one for one in program if one.name == "work")
    assert (work.cycles, work.runs, work.total_cycles) == (100, runs, 100 * runs)
    assert total(program) == 100 * runs + 1
    assert all(one.known for one in program)


@pytest.mark.parametrize(
    "arguments",
    [{"init": "other"}, {"limit": "0.5"}, {"direction": "GT"}, {"step": "-1"}],
)
def test_a_loop_of_unknown_length_counts_once_and_is_told(arguments):
    program = operations(loop(**arguments))
    assert total(program) == 101
    assert [one.name for one in program if not one.known] == ["loop"]


def test_an_operation_says_what_it_is_and_where_it_comes_from():
    program = operations(loop())
    (work,) = (one for one in program if one.name == "work")
    assert (work.opcode, work.source) == ("fusion", "jit(step)/while/body/mul")
    assert [file.rpartition("/")[2] for file in work.files] == ["mixing.py", "step.py", "run.py"]
    assert work.result_bytes == 64 * 128 * 2
    # A fusion's inside is part of its own estimate.
    assert "inner" not in {one.name for one in program}


def test_branches_count_as_taken_alike_often():
    program = operations(f"""HloModule jit_step
%a (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %one = f32[8]{{0}} fusion(%p), calls=%x, {CYCLES % 30}
}}
%b (q: f32[8]) -> f32[8] {{
  ROOT %q = f32[8]{{0}} parameter(0)
}}
ENTRY %main (i: s32[], y: f32[8], z: pred[]) -> f32[8] {{
  %i = s32[] parameter(0)
  %y = f32[8]{{0}} parameter(1)
  %z = pred[] parameter(2)
  %three = f32[8]{{0}} conditional(%i, %y, %y, /*index=3*/%y), \
branch_computations={{%a, %b, %b}}, metadata={{op_name="jit(step)/cond"}}
  ROOT %two = f32[8]{{0}} conditional(%z, %three, %three), true_computation=%a, \
false_computation=%b
}}
""")
    assert total(program) == pytest.approx(30 / 3 + 30 / 2)


def test_what_has_no_estimate_is_told_unless_it_is_small_or_beside_the_computation():
    program = operations("""HloModule jit_step
ENTRY %main (x: f32[2048]) -> f32[2048] {
  %x = f32[2048]{0} parameter(0)
  %small = f32[8]{0} slice(%x), slice={[0:8]}
  %reversed = f32[2048]{0} reverse(%x), dimensions={0}
  %start = (f32[2048]{0}, f32[2048]{0}, u32[]) copy-start(%reversed)
  %done = f32[2048]{0} copy-done(%start)
  %named = f32[2048]{0} custom-call(%done), custom_call_target="ConcatBitcast"
  ROOT %kernel = f32[8]{0} custom-call(%named), custom_call_target="tpu_custom_call"
}
""")
    assert [one.name for one in program if not one.known] == ["reversed", "kernel"]


def test_collectives_count_with_the_whole_arrays_bytes():
    program = operations("""HloModule jit_step
%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), to_apply=%sum
  ROOT %own = f32[8]{0} dynamic-slice(%all-reduce.9, %p), dynamic_slice_sizes={8}
}
%started (p.1: f32[8]) -> (f32[8], f32[64]) {
  %p.1 = f32[8]{0} parameter(0)
  %all-gather.1 = f32[64]{0} all-gather(%p.1), frontend_attributes={chain_id="4"}
  ROOT %begin = (f32[8]{0}, f32[64]{0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}
%goes_on (p.2: f32[8]) -> f32[64] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %all-gather.2 = f32[64]{0} all-gather(%p.2), frontend_attributes={chain_id="4"}
}
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %start = (f32[64]{0}, f32[64]{0}) all-reduce-start(%x), replica_groups={}, to_apply=%sum
  %done = f32[64]{0} all-reduce-done(%start)
  %sums = (f32[64]{0}, pred[3]{0}) all-reduce(%x, %y), to_apply=%sum
  %part = f32[8]{0} reduce-scatter(%done), dimensions={0}, to_apply=%sum
  %fusion.1 = f32[8]{0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = (f32[8]{0}, f32[64]{0}) fusion(%part), kind=kCustom, calls=%started
  %fusion.3 = f32[64]{0} fusion(%fusion.2), kind=kCustom, calls=%goes_on
  ROOT %gather = f32[64]{0} all-gather(%part), dimensions={0}
}
""")
    assert [(one.opcode, one.result_bytes) for one in collectives(program)] == [
        ("all-reduce-done", 256),
        ("all-reduce", 256 + 3),
        ("reduce-scatter", 256),
        ("reduce-scatter", 256),
        ("all-gather", 256),
        ("all-gather", 256),
    ]
    assert all(one.known for one in program)


def test_a_text_without_an_entry():
    with pytest.raises(ValueError, match="no ENTRY"):
        operations("HloModule nothing\n")
