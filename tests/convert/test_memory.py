"""Converting the largest of the authors' files in a fraction of its size."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_files import pickled, tensor

from convnext_jax.convert.layouts.official import OFFICIAL
from convnext_jax.models import create_model

ROOT = Path(__file__).parents[2]


# Linux keeps a high-water mark per address space; `ru_maxrss` would take over the parent's.
PROGRAM = """
import sys
from convnext_jax.convert.__main__ import main
main(sys.argv[1:])
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0], "KiB")
"""


def write_large(path, model):
    """A file of `torch.save` with random weights under the authors' names, a tensor at a time."""
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
    }
    rng = np.random.default_rng(0)
    views = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, (name, ours, transform) in enumerate(OFFICIAL.tensors(model.depths)):
            if ours in shapes:
                values = rng.standard_normal(transform.their_shape(shapes[ours]), np.float32)
                archive.writestr(f"archive/data/{i}", values.tobytes())
                # The pickle says the shape alone; strides of 0 take no memory.
                views[name] = tensor(str(i), np.broadcast_to(np.float32(0), values.shape))
        archive.writestr("archive/data.pkl", pickled({"model": views}))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_convnext_xlarge_converts_in_less_than_its_own_size(tmp_path):
    source = tmp_path / "convnext_xlarge_22k_1k_224_ema.pth"
    write_large(source, create_model("convnext_xlarge"))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, tmp_path / "xlarge"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - started
    assert "convnext_xlarge" in done.stdout
    assert "350,196,968 parameters" in done.stdout
    peak = 1024 * int(done.stdout.split()[-2])
    size = source.stat().st_size
    print(
        f"{source.name}: {size / 2**20:,.0f} MiB converted in {seconds:.1f} s, "
        f"peak memory {peak / 2**20:,.0f} MiB, {peak / size:.2f} of the file\n{done.stdout}"
    )
    assert peak < 1.3 * size
