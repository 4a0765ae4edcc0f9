"""Which part of the model an operation belongs to, by the names that JAX gives operations."""

import pytest

from convnext_jax.analysis.cost import costs_by_part, model_part
from convnext_jax.analysis.hlo import Operation

MODEL = "jit(train_step)/jvp(ConvNeXt)/ConvNeXt._stage_outputs"
BACK = "jit(train_step)/transpose(jvp(ConvNeXt))/ConvNeXt._stage_outputs"
LIBRARY = "/lib/convnext_jax"


def operation(source, files=(), cycles=10, runs=1.0):
    return Operation("op", "fusion", source, cycles, runs, 4, tuple(files))


@pytest.mark.parametrize(
    ("source", "files", "part"),
    [
        (f"{MODEL}/stem/conv/conv_general_dilated", (), ("stem", "forward")),
        (f"{MODEL}/stages_2/blocks_11/dwconv/cond/branch_1_fun/conv_general_dilated", (), ()),
        (f"{BACK}/stages_0/blocks_1/pwconv1/dot_general", (), ("stages_0 pwconv1", "backward")),
        (f"{MODEL}/stages_3/blocks_0/erfc", (), ("stages_3 activation", "forward")),
        (
            f"{BACK}/stages_2/while/body/closed_call/rematted_computation/blocks/pwconv2/dot_general",
            (),
            ("stages_2 pwconv2", "backward"),
        ),
        (f"{BACK}/stages_2/while/body/dynamic_slice", (), ("stages_2 loop", "backward")),
        (f"{MODEL}/stages_3/blocks_0/stochastic_depth/mul", (), ("stages_3 residual", "forward")),
        (f"{BACK}/stages_1/downsample/norm/mul", (), ("stages_1 downsample", "backward")),
        (
            f"{BACK}/stages_1/checkpoint/rematted_computation/blocks_2/norm/mul",
            (),
            ("stages_1 norm", "backward"),
        ),
        ("jit(train_step)/jvp(ConvNeXt)/ConvNeXt._pool/norm/mul", (), ("head", "forward")),
        ("jit(train_step)/transpose(jvp(ConvNeXt))/head/dot_general", (), ("head", "backward")),
        ("jit(train_step)/jvp()/log_softmax/sub", (), ("loss", "forward")),
        ("jit(train_step)/mul", (f"{LIBRARY}/data/mixing.py",), ("mixing", "")),
        (
            "jit(train_step)/shard_map/while/body/closed_call/cond/add",
            (f"{LIBRARY}/data/color_ops.py", f"{LIBRARY}/data/augment.py"),
            ("augmentation", ""),
        ),
        ("jit(train_step)/shard_map/transpose", (), ("augmentation", "")),
        (
            "jit(train_step)/jit(_where)/select_n",
            (f"{LIBRARY}/training/step.py",),
            ("optimizer and average", ""),
        ),
        ("", (), ("copies without a name", "")),
    ],
)
def test_parts(source, files, part):
    expected = part or ("stages_2 dwconv", "forward")
    assert model_part(operation(source, files)) == expected


def test_costs_are_summed_over_runs_and_sorted():
    costs = costs_by_part(
        [
            operation(f"{MODEL}/stem/conv/conv_general_dilated", runs=2.0),
            operation(f"{MODEL}/stem/norm/mul", cycles=5),
            operation("jit(train_step)/jit(_where)/select_n", cycles=30),
            operation("jit(train_step)/add", cycles=0),
            operation(f"{MODEL}/stages_0/blocks_0/dwconv/x", cycles=0),
        ]
    )
    assert [(one.part, one.direction, one.operations, one.cycles) for one in costs] == [
        ("optimizer and average", "", 1, 30),
        ("stem", "forward", 2, 25),
    ]
