"""How long the training step takes to compile: of Flax's own layers, as it is, and in loops.

    python benchmarks/compile_time.py digits tiny
    pip install 'convnext-jax[plan]'
    python benchmarks/compile_time.py tiny base --backends cpu v5e:1x1

Traces, lowers and compiles the training step of configs/ for one device of each backend, in a
process of its own each time, so that nothing is found ready. The ways: blocks of Flax's own
layers (`plain_flax.py`), this library's one by one, and its `scan_blocks`; each as often as
`--rounds` says, in turn. Processor seconds of each phase and of all three, which a busy machine
disturbs less than the wall-clock seconds beside them, medians of the rounds. For a TPU also what
the compiler expects the step itself to take. The last table is in benchmarks/README.md.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
WAYS = ("flax", "one by one", "scanned")


def measure(size, backend, way, images):
    """Seconds of the phases, in this process."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    import jax.numpy as jnp
    from plain_flax import plain_flax

    from convnext_jax import config_files, experiment
    from convnext_jax.analysis.hlo import operations
    from convnext_jax.analysis.tpu import tpu_topology
    from convnext_jax.analysis.without_kernels import without_kernels
    from convnext_jax.training import sharding
    from convnext_jax.training.state import abstract_state
    from convnext_jax.training.step import jit_train_step

    devices = jax.devices() if backend == "cpu" else tpu_topology(backend).devices
    mesh = sharding.create_mesh(1, 1, devices[:1])
    config = config_files.load_config(str(CONFIGS / f"{size}.py"))
    config.model.scan_blocks, config.batch_size = way == "scanned", images
    config.mix.group_size = images
    durations = experiment.durations(config, 1_281_167)
    model = experiment.build_model(config, 1000, 1)
    if backend != "cpu":
        model = without_kernels(model)  # of which the compiler has no estimate
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
    with plain_flax() if way == "flax" else contextlib.nullcontext():
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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--images", type=int, default=32, help="of a batch")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    titles = ["config", "backend", "blocks", "trace", "lower", "compile", "together", "ratio"]
    titles += ["wall clock", "cycles of a step", "temporaries"]
    print("|", " | ".join(titles), "|\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for size, backend in itertools.product(arguments.sizes, arguments.backends):
        rounds = {way: [] for way in arguments.ways}
        for _, (way, rows) in itertools.product(range(arguments.rounds), rounds.items()):
            rows.append(in_a_process_of_its_own(size, backend, way, arguments.images))
        first, *_ = rounds.values()
        for way, rows in rounds.items():
            *seconds, wall, cycles, temporaries = map(statistics.median, zip(*rows, strict=True))
            ratio = statistics.median(b[3] / a[3] for a, b in zip(first, rows, strict=True))
            cells = [f"{phase:.1f} s" for phase in seconds]
            cells += [f"{ratio:.2f}", f"{wall:.1f} s"]
            cells += [f"{cycles / 1e6:.1f} M" if cycles else "", f"{temporaries / 1e9:.2f} GB"]
            print("|", " | ".join([size, backend, way, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
