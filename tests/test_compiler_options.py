from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from convnext_jax import compiler_options


def test_cpus_alone_have_options():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    options = compiler_options.for_network(mesh)
    assert options == compiler_options.for_network() != {}
    chip = mock.Mock(devices=np.asarray([mock.Mock(platform="tpu")]))
    assert compiler_options.for_network(chip) == {}
    jax.jit(lambda x: x + 1, compiler_options=options)(np.ones(3))


def test_options_that_this_jaxlib_lacks_are_left_out():
    unknown = ("xla_cpu_of_another_version", "true")
    known = compiler_options._WIDE_VECTORS
    assert compiler_options._known((unknown, known)) == dict([known])
