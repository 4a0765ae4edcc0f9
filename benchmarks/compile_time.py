"""How long the training step takes to compile, its blocks scanned and one by one.

    python benchmarks/compile_time.py tiny base
    pip install 'convnext-jax[plan]'
    python benchmarks/compile_time.py tiny base --backends cpu v5e:1x1

Traces, lowers and compiles the training step of configs/ for one device of each backend, in a
process of its own each time, so that nothing is found ready. Processor seconds of each phase and of
all three, which a busy machine disturbs less than the wall-clock seconds beside them. For a
TPU also what the compiler expects the step itself to take. The last table is in
benchmarks/README.md.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def measure(size, backend, scan, images):
    """Seconds of the phases, in this process."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    import jax.numpy as jnp

    from convnext_jax import config_files, experiment
    from convnext_jax.analysis.hlo import operations
    from convnext_jax.analysis.tpu import tpu_topology
    from convnext_jax.training import sharding
    from convnext_jax.training.state import abstract_state
    from convnext_jax.training.step import jit_train_step

    devices = jax.devices() if backend == "cpu" else tpu_topology(backend).devices
    mesh = sharding.create_mesh(1, 1, devices[:1])
    config = config_files.load_config(str(CONFIGS / f"{size}.py"))
    config.model.scan_blocks, config.batch_size = scan, images
    config.mix.group_size = images
    durations = experiment.durations(config, 1_281_167)
    model = experiment.build_model(config, 1000, 1)
    optimizer, schedule = experiment.build_optimizer(config, model, durations)
    shape = (config.data.image_size, config.data.image_size, 3)
    state = abstract_state(model, optimizer, shape, mesh, ema=True)
    train_step = experiment.build_train_step(config, model, optimizer, schedule, mesh)
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((images, *shape), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows),
    }
    step = jit_train_step(train_step, state, mesh)
    wall, processor = time.perf_counter(), [time.process_time()]
    traced = step.trace(state, batch)
    processor.append(time.process_time())
    lowered = traced.lower()
    processor.append(time.process_time())
    compiled = lowered.compile()
    processor.append(time.process_time())
    phases = [later - sooner for sooner, later in itertools.pairwise(processor)]
    wall = time.perf_counter() - wall
    cycles = sum(one.total_cycles for one in operations(compiled.as_text()))
    return [*phases, sum(phases), wall, cycles, compiled.memory_analysis().temp_size_in_bytes]


def in_a_process_of_its_own(*arguments):
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["base"], help="names in configs/")
    parser.add_argument("--backends", nargs="+", default=["cpu"], help="cpu, or a TPU topology")
    parser.add_argument("--images", type=int, default=32, help="of a batch")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    titles = ["config", "backend", "blocks", "trace", "lower", "compile", "together"]
    titles += ["wall clock", "cycles of a step", "temporaries"]
    print("|", " | ".join(titles), "|\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for size in arguments.sizes:
        for backend in arguments.backends:
            rows = []
            for scan in (False, True):
                measured = in_a_process_of_its_own(size, backend, scan, arguments.images)
                *seconds, cycles, temporaries = measured
                cells = [f"{phase:.1f} s" for phase in seconds]
                cells += [f"{cycles / 1e6:.1f} M" if cycles else "", f"{temporaries / 1e9:.2f} GB"]
                kind = "scanned" if scan else "one by one"
                print("|", " | ".join([size, backend, kind, *cells]), "|", flush=True)
                rows.append(measured)
            ratios = [f"{b / a:.2f}×" if a else "" for a, b in zip(*rows, strict=True)]
            print("|", " | ".join([size, backend, "ratio", *ratios]), "|", flush=True)


if __name__ == "__main__":
    main()
