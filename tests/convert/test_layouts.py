"""The tables: each reads what it writes, and its transforms are inverse to each other."""

import itertools

import numpy as np
import pytest

from convnext_jax.convert.families import FAMILIES, LAYOUTS
from convnext_jax.convert.layouts import table as tables

NAMED = {layout.name: layout for layout in LAYOUTS}
# Shapes of ours, and theirs, by transform.
TRANSFORMS = {
    "AS_IS": ((5,), (5,)),
    "CONV_KERNEL": ((2, 3, 4, 5), (5, 4, 2, 3)),
    "LINEAR_KERNEL": ((4, 5), (5, 4)),
    "CONV1X1_KERNEL": ((4, 5), (5, 4, 1, 1)),
    "ROW_2D": ((5,), (1, 5)),
    "ROW_4D": ((5,), (1, 1, 1, 5)),
    "COLUMN_3D": ((5,), (5, 1, 1)),
    "SPARSE_KERNEL": ((2, 2, 4, 5), (4, 4, 5)),
    "SPARSE_DEPTHWISE_KERNEL": ((7, 7, 1, 5), (49, 5)),
    "TABLE": ((5, 4), (5, 4)),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_table_reads_the_names_it_writes(name):
    depths = (2, 1, 12, 3)
    seen = set()
    for theirs, ours, transform in NAMED[name].tensors(depths):
        assert NAMED[name].find(theirs) == (ours, transform)
        assert theirs not in seen
        seen.add(theirs)


@pytest.mark.parametrize("name", NAMED)
def test_no_table_reads_a_name_that_is_no_number_of_its_own(name):
    layout = NAMED[name]
    for theirs, _, _ in layout.tensors((1, 1)):
        assert layout.find(theirs + ".weight") is None
        assert layout.find("a" + theirs) is None


def test_numbers_in_names():
    torchvision = NAMED["torchvision"]
    assert torchvision.find("features.5.8.block.3.weight")[0] == "stages_2/blocks_8/pwconv1/kernel"
    assert torchvision.find("features.4.1.bias")[0] == "stages_2/downsample/conv/bias"
    # An even entry holds a downsampling, an odd one blocks.
    assert torchvision.find("features.4.8.block.3.weight") is None
    assert torchvision.find("features.5.1.bias") is None
    assert NAMED["timm"].find("stages.3.blocks.2.mlp.fc3.weight") is None


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_inverse_to_each_other(name):
    transform = getattr(tables, name)
    ours_shape, theirs_shape = TRANSFORMS[name]
    ours = np.arange(np.prod(ours_shape)).reshape(ours_shape)
    theirs = transform.inverse(ours)
    assert theirs.shape == theirs_shape == transform.their_shape(ours_shape)
    assert transform.ndim == theirs.ndim
    assert transform.our_shape(theirs_shape) == ours_shape
    np.testing.assert_array_equal(transform.forward(theirs), ours)


def test_every_transform_is_tested():
    found = {k for k, v in vars(tables).items() if isinstance(v, tables.Transform)}
    assert found == TRANSFORMS.keys()


def test_conv_kernels_keep_rows_and_columns_apart():
    """PyTorch's kernel[o, i, row, column] is kernel[row, column, i, o] here."""
    kernel = np.arange(2 * 3 * 4 * 5).reshape(5, 4, 2, 3)
    ours = tables.CONV_KERNEL.forward(kernel)
    for o, i, row, column in itertools.product(range(5), range(4), range(2), range(3)):
        assert ours[row, column, i, o] == kernel[o, i, row, column]


def test_a_shape_of_another_kind_is_none():
    assert tables.LINEAR_KERNEL.our_shape((4, 5, 1, 1)) is None
    assert tables.CONV1X1_KERNEL.our_shape((4, 5, 3, 3)) is None
    assert tables.ROW_4D.our_shape((1, 2, 1, 5)) is None
    assert tables.SPARSE_KERNEL.our_shape((5, 4, 3)) is None


def test_every_way_back_is_a_layout_that_is_read():
    for family in FAMILIES:
        for layouts in family.ways_back.values():
            assert layouts
            assert set(layouts) <= set(family.layouts)
