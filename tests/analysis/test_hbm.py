"""Reading off a program's text what it moves between the chip and its memory."""

import pytest

from convnext_jax.analysis.hbm import hbm_bytes, traffic

PROGRAM = """HloModule jit_update, is_scheduled=true

%fused (p: f32[8,128], q: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  %sum = f32[8,128]{1,0:T(8,128)} add(%p, %q)
  ROOT %both = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%sum, %q)
}

ENTRY %main (p: f32[8,128], q: f32[64,128]) -> (f32[8,128], f32[8,128]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = f32[64,128]{1,0:T(8,128)} parameter(1)
  %slice-start = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%q), slice={[0:8], [0:128]}
  %slice-done = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %fusion = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) fusion(%p, %slice-done), \
kind=kLoop, calls=%fused, metadata={op_name="jit(update)/add"}
  %kept = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%fusion), index=1
  %copy-start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
copy-start(%kept)
  %out = f32[8,128]{1,0:T(8,128)} copy-done(%copy-start)
  %sum.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%fusion), index=0
  ROOT %tuple = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%sum.1, %out)
}
"""
REGISTER = 8 * 128 * 4


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("f32[768,3072]{1,0:T(8,128)}", 768 * 3072 * 4),
        ("f32[768,3072]{1,0:T(8,128)S(1)}", 0),
        ("f32[7,7,1,96]{3,2,1,0:T(8,128)}", 7 * 7 * 8 * 128 * 4),
        ("f32[7,7,1,96]{3,0,2,1:T(8,128)}", 7 * 8 * 128 * 4),
        ("bf16[100,96]{0,1:T(8,128)(2,1)}", 96 * 128 * 2),
        ("f32[96]{0:T(128)}", 128 * 4),
        ("f32[]{:T(128)}", 4),
        ("(f32[8]{0}, (pred[3]{0}, s32[2]{0:S(6)}))", 35),
    ],
)
def test_padded_sizes(shape, wanted):
    assert hbm_bytes(shape) == wanted


def test_what_moves():
    """A slice counts as itself, and what stays on the chip not at all."""
    moved = {one.name: (one.read, one.written) for one in traffic(PROGRAM)}
    assert moved == {
        "slice-start": (REGISTER, 0),
        "fusion": (REGISTER, REGISTER),
        "copy-start": (0, REGISTER),
    }
    assert [one.source for one in traffic(PROGRAM) if one.name == "fusion"] == ["jit(update)/add"]


def test_loops_are_refused():
    loop = "  %w = f32[8,128]{1,0} while(%p), condition=%c, body=%b\n  ROOT"
    with pytest.raises(ValueError, match="w is a loop or a branch"):
        traffic(PROGRAM.replace("  ROOT %tuple", loop + " %tuple"))
