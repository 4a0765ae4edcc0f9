from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from convnext_jax import compiler_options


@pytest.mark.parametrize("options", [compiler_options.for_inference, compiler_options.for_training])
def test_cpus_alone_have_options(options):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    assert options(mesh) == options() != {}
    chip = mock.Mock(devices=np.asarray([mock.Mock(platform="tpu")]))
    assert options(chip) == {}
    jax.jit(lambda x: x + 1, compiler_options=options(mesh))(np.ones(3))


def test_options_that_this_jaxlib_lacks_are_left_out():
    unknown = ("xla_cpu_of_another_version", "true")
    known = compiler_options._WIDE_VECTORS
    assert compiler_options._on_cpus((unknown, known), None) == dict([known])
