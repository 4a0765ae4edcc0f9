"""What the update of a training step moves on a TPU v5e, against the least it could; no TPU needed.

    pip install 'convnext-jax[plan]'
    python benchmarks/tpu_update.py
    python benchmarks/tpu_update.py --whole_step

Compiles `training/update.py` alone for one chip, the state donated: AdamW, the average, and the
guard, which leaves all as it was where the gradient is not finite. The least is each of parameters,
two moments, average and gradient read once, and all but the gradient written once: 36 bytes a
parameter. The gradient's norm must be known before anything may be written; what of the gradient
does not stay in vector memory in between is read twice, 40 bytes at most. Beside it stand variants,
to see what each part costs:

    no guard   nothing waits for the norm
    clipped    by the gradient's norm, which is read for the guard already
    guard last the average of the new parameters, and all guarded at the end

Bytes are of HBM, read from the compiled program by `analysis/hbm.py`, tiles' padding included;
cycles are the compiler's estimates, beside what the 36 bytes take at the memory's bandwidth. With
--whole_step the training step of ConvNeXt-T at 256 images is compiled as well, and the update's
share of its cycles added; that takes some minutes. The last table is in benchmarks/README.md.
"""

import argparse
import importlib.metadata

import jax
import jax.numpy as jnp
import optax
from tpu_tiny_step import IMAGES, compiled_step

from convnext_jax.analysis.cost import model_part
from convnext_jax.analysis.hbm import traffic
from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.models.registry import create_model
from convnext_jax.tables import markdown_table
from convnext_jax.training import optim, sharding
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.state import TrainState, abstract_state
from convnext_jax.training.update import make_update

LEAST = 36  # bytes a parameter
EMA_DECAY = 0.9999


def unguarded(optimizer):
    """The update without its guard."""

    def update(state, loss, grads, batch_stats):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optim.update_ema(state.ema_params, params, EMA_DECAY)
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=None,
            opt_state=opt_state,
            ema_params=ema_params,
            ema_batch_stats=None,
            skipped=state.skipped,
        )

    return update


def guarded_last(optimizer):
    """The update with the guard behind all else."""
    plain = unguarded(optimizer)

    def update(state, loss, grads, batch_stats):
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = plain(state, loss, grads, batch_stats)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return kept, grad_norm, finite

    return update


def program(make, name, clip_norm, chip):
    """The optimised program's text, and the number of parameters."""
    mesh = sharding.create_mesh(1, 1, chip.devices[:1])
    model = create_model(name, num_classes=1000, dtype=jnp.bfloat16)
    schedule = warmup_cosine(4e-3, 1e-6, 10, 100)
    optimizer = optim.adamw(schedule, depths=model.depths, weight_decay=0.05, clip_norm=clip_norm)
    state = abstract_state(model, optimizer, (224, 224, 3), mesh, ema=True)
    held = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = sharding.replicated(mesh)
    update = jax.jit(
        lambda state, loss, grads: make(optimizer)(state, loss, grads, None),
        in_shardings=(held, replicated, held.params),
        donate_argnums=0,
    )
    loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    compiled = compile_for_tpu(update, state, loss, state.params)
    return compiled.as_text(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


def whole_step():
    """A line on the update's share of a training step."""
    text = compiled_step().as_text()
    total = update = 0.0
    for operation in operations(text):
        total += operation.total_cycles
        if model_part(operation)[0] == "optimizer and average":
            update += operation.total_cycles
    return (
        f"Of the training step of ConvNeXt-T at {IMAGES} images, {total:,.0f} cycles, the update "
        f"is {update:,.0f}, {update / total:.2%}."
    )


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="convnext_tiny")
    parser.add_argument("--whole_step", action="store_true")
    arguments = parser.parse_args()
    topology = tpu_topology("v5e:2x2")
    chip = topology.chip

    def ours(optimizer):
        return make_update(optimizer, EMA_DECAY)

    variants = {
        "**the update**": (ours, None),
        "clipped": (ours, 1.0),
        "no guard": (unguarded, None),
        "guard last": (guarded_last, None),
    }
    rows = []
    for name, (make, clip_norm) in variants.items():
        text, parameters = program(make, arguments.model, clip_norm, topology)
        moved = traffic(text)
        read, written = sum(one.read for one in moved), sum(one.written for one in moved)
        cycles = sum(one.total_cycles for one in operations(text))
        least_cycles = LEAST * parameters / chip.hbm_bandwidth * chip.clock
        rows.append(
            [
                name,
                f"{read / parameters:.2f}",
                f"{written / parameters:.2f}",
                f"{(read + written) / parameters / LEAST:.3f}",
                f"{cycles:,.0f}",
                f"{cycles / least_cycles:.2f}",
            ]
        )
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    print(f"{arguments.model}, {parameters:,} parameters, one {chip.name}; {', '.join(versions)}\n")
    header = ["", "read, B a parameter", "written", "÷ least", "cycles", "÷ least"]
    print(markdown_table(header, rows), flush=True)
    if arguments.whole_step:
        print(f"\n{whole_step()}")


if __name__ == "__main__":
    main()
