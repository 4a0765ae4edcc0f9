import jax
import jax.numpy as jnp
import pytest

from convnext_jax.training.batch_size import device_memory, fitting_batch, program_bytes


class Program:
    """Compiled, it would take 1,000 bytes and 10 an image on each of 4 devices."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def memory_analysis(self):
        class Memory:
            argument_size_in_bytes = 600
            output_size_in_bytes = 500
            alias_size_in_bytes = 100
            temp_size_in_bytes = 10 * self.batch_size // 4

        return Memory


@pytest.mark.parametrize(
    ("available", "each", "tried"),
    [
        (10**6, 256, 1),
        (3560 * 5 // 4, 256, 1),  # four fifths of the memory are used
        (3560 * 5 // 4 - 5, 128, 2),
        (1_500, 16, 5),
        (900, 1, 9),  # even where one image does not seem to fit
    ],
)
def test_the_largest_that_fits(available, each, tried):
    compiled = []

    def compile_for(batch_size):
        compiled.append(batch_size)
        return Program(batch_size)

    found = fitting_batch(compile_for, 10**5, 4, bytes_available=available)
    assert found.size == found.compiled.batch_size == 4 * each
    assert found.bytes_needed == 1000 + 10 * each
    assert len(compiled) == tried


def test_no_larger_than_the_data_set_asks_for():
    assert fitting_batch(Program, 100, 4, bytes_available=10**6).size == 4 * 32
    assert fitting_batch(Program, 3, 4, bytes_available=10**6).size == 4


def test_on_the_cpu():
    assert device_memory(jax.devices()[0]) is None
    assert fitting_batch(Program, 10**5, 4, bytes_available=None).size == 32
    assert fitting_batch(Program, 10**5, 64, bytes_available=None).size == 64


def test_what_a_real_program_takes():
    def step(x):
        return jnp.sort(x @ x.T, axis=0).sum()

    def compile_for(size):
        return jax.jit(step).lower(jax.ShapeDtypeStruct((size, 8), jnp.float32)).compile()

    needed = program_bytes(compile_for(256))
    assert needed > 256 * 256 * 4, "the matrix between must be counted"
    found = fitting_batch(compile_for, 10**5, 1, bytes_available=needed)
    assert found.size == 128
    assert found.compiled(jnp.ones((128, 8))) == 128 * 128 * 8
