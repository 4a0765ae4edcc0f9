"""One sum over all devices, held to its exact value, and timed."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.preflight.examination import Finding
from convnext_jax.training.sharding import batch_sharding, create_mesh, replicated

# int32 values on each device, 16 MiB: what a network of some millions of parameters exchanges.
_LENGTH = 2**22
_PERIOD = 97
_REPEATS = 5


def all_reduce() -> Finding[float]:
    """Sums an array of each device over all of them; every process must call it.

    Returns:
      Seconds for one sum.

    Raises:
      UserError: if the sum is wrong anywhere on this process's devices.
    """
    mesh = create_mesh()
    count = mesh.size
    pattern = np.arange(_LENGTH, dtype=np.int32) % _PERIOD + 1

    def rows(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        device = range(count)[index[0]]
        return np.stack([(number + 1) * pattern for number in device])

    values = jax.make_array_from_callback((count, _LENGTH), batch_sharding(mesh), rows)
    add = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=replicated(mesh))
    total = jax.block_until_ready(add(values))
    wanted = count * (count + 1) // 2 * pattern
    for shard in total.addressable_shards:
        wrong = np.flatnonzero(np.asarray(shard.data) != wanted)
        if wrong.size:
            raise UserError(
                f"the sum over {count} devices is wrong on {shard.device} in {wrong.size:,} of "
                f"{_LENGTH:,} places; a device or a link is defective: take another machine"
            )
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(add(values))
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    return Finding(
        f"the sum of 16 MiB over {count} devices is exact, and takes {seconds * 1e3:.2f} ms",
        seconds,
        measure=-seconds,
    )
