"""A ceiling on what a test may allocate."""

import contextlib
import resource
from pathlib import Path


@contextlib.contextmanager
def memory_limit(num_bytes):
    """Inside, this process gets a MemoryError for more than `num_bytes` on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(now + num_bytes), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
