"""Every test sees eight CPU devices, and implicit promotion is an error.

What the tests would spend their time on is XLA's optimisation of programs that run a few times.
So it is left out, and what is compiled twice is taken from a cache that lives for the session.
"""

import atexit
import os
import shutil
import tempfile

# Read by XLA when the first backend starts, so it must be set before anything touches jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Programs that tests start find it here, too; else they would write to the user's own.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="convnext_jax_tests_")

import jax

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
