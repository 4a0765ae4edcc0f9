"""What augmentation costs on a TPU v5e, by the compiler's own estimate; no TPU is needed.

    pip install libtpu
    python benchmarks/tpu_augmentation.py

Compiles the training step of ConvNeXt-T at 256 images a chip in bfloat16 twice: with the paper's
augmentation (RandAugment, normalisation, random erasing, mixup and cutmix), and with normalisation
alone. It adds up the cycles that the compiler estimates for each operation of the optimised
program. Where the program branches, a branch counts by the probability that the policy takes it:
this is the cost of an average batch. A compilation takes minutes.

These are estimates, not measurements. The last table is in benchmarks/README.md.
"""

import os

# Read when jax and libtpu start.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import importlib.metadata
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from convnext_jax import experiment
from convnext_jax.data.augment import AugmentConfig
from convnext_jax.data.mixing import MixConfig
from convnext_jax.models.registry import create_model
from convnext_jax.recipes import imagenet_1k
from convnext_jax.training import optim, sharding
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.state import abstract_state
from convnext_jax.training.step import jit_train_step, make_train_step

IMAGES = 256
SIZE = 224


def compiled_step(augment_config, mix_config):
    """The optimised program's text."""
    topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    mesh = sharding.create_mesh(1, 1, topology.devices[:1])
    model = create_model("convnext_tiny", num_classes=1000, drop_path_rate=0.1, dtype=jnp.bfloat16)
    schedule = warmup_cosine(4e-3, 1e-6, 10, 100)
    optimizer = optim.adamw(schedule, depths=model.depths, weight_decay=0.05)
    state = abstract_state(model, optimizer, (SIZE, SIZE, 3), mesh, ema=True)
    step = make_train_step(
        model,
        optimizer,
        schedule,
        num_classes=1000,
        mix_config=mix_config,
        seed=0,
        ema_decay=0.9999,
        augment_config=augment_config,
        mesh=mesh,
    )
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((IMAGES, SIZE, SIZE, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((IMAGES,), jnp.int32, sharding=rows),
    }
    return jit_train_step(step, state, mesh).trace(state, batch).lower().compile().as_text()


class Program:
    """The computations of a program's text, and their estimated cycles."""

    def __init__(self, text):
        self.lines = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                if line.startswith("ENTRY"):
                    self.entry = name
                self.lines[name] = []
            elif line.startswith("  "):
                self.lines[name].append(line)

    def own(self, name):
        """Cycles of a computation's own operations, its loops and branches left out."""
        found = [re.search(r'"estimated_cycles":"(\d+)"', line) for line in self.lines[name]]
        return sum(int(match[1]) for match in found if match)

    def branches(self, name):
        """Of each conditional in a computation, the names of its branches."""
        found = [re.search(r"branch_computations=\{([^}]*)\}", line) for line in self.lines[name]]
        return [[b.strip().lstrip("%") for b in match[1].split(",")] for match in found if match]

    def bodies(self, name):
        """The bodies of a computation's loops."""
        found = [re.search(r" while\(.*body=%?([\w.\-]+)", line) for line in self.lines[name]]
        return [match[1] for match in found if match]

    def once(self, name):
        """Cycles of a computation, its loops run once: what rejects a draw seldom runs again."""
        return self.own(name) + sum(self.once(body) for body in self.bodies(name))


def main():
    """Prints the table."""
    config = imagenet_1k("convnext_tiny", drop_path_rate=0.1)
    augment_config = experiment.build_augmentation(config)
    policy, erasing = augment_config.policy, augment_config.erasing
    plain = Program(compiled_step(AugmentConfig(), MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0)))
    full = Program(compiled_step(augment_config, experiment.build_mixing(config)))

    # The loop over the images holds the loop over an image's operations, which holds the switch.
    images = next(
        body
        for body in full.bodies(full.entry)
        if any(full.branches(inner) for inner in full.bodies(body))
    )
    (operations,) = full.bodies(images)
    (switch,) = full.branches(operations)
    (erase,) = full.branches(images)
    # Each operation is drawn alike, and skipped with a probability.
    expected = IMAGES * policy.length * policy.prob / (len(policy.names) - 1)
    rows = [
        (name, full.own(branch), expected)
        for name, branch in zip(policy.names, switch, strict=True)
        if name != "Identity"
    ]
    rows.append(("random erasing", full.own(erase[1]), IMAGES * erasing.prob))
    rows.append(("taking up an operation", full.own(operations), IMAGES * policy.length))
    rows.append(("the image in, normalised, out", full.own(images), IMAGES))
    without = plain.once(plain.entry)
    rest = full.once(full.entry) - full.once(images) - without
    total = sum(cycles * count for _, cycles, count in rows) + rest

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    print(f"ConvNeXt-T, {IMAGES} images on one v5e chip, bfloat16; {', '.join(versions)}\n")
    print("| part | cycles an image | images | cycles |\n|---|---:|---:|---:|")
    for name, cycles, count in sorted(rows, key=lambda row: -row[1] * row[2]):
        print(f"| {name} | {cycles:,} | {count:.1f} | {cycles * count:,.0f} |")
    print(f"| mixing, and turning the batch around | | | {rest:,} |")
    print(f"| **augmentation** | | | **{total:,.0f}** |")
    print(f"| the step with normalisation alone | | | {without:,} |")
    print(f"\nAugmentation adds {total / without:.1%} to the step.")


if __name__ == "__main__":
    main()
