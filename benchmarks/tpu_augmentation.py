"""What augmentation costs on a TPU v5e, by the compiler's own estimate; no TPU is needed.

    pip install 'convnext-jax[plan]'
    python benchmarks/tpu_augmentation.py

Compiles the training step of ConvNeXt-T at 256 images a chip in bfloat16 twice: with the paper's
augmentation (RandAugment, normalisation, random erasing, mixup and cutmix), and with normalisation
alone. It adds up the cycles that the compiler estimates for each operation of the optimised
program. Where the program branches, a branch counts by the probability that the policy takes it:
this is the cost of an average batch. A compilation takes minutes.

These are estimates, not measurements. The last table is in benchmarks/README.md.
"""

import importlib.metadata
import re

from tpu_tiny_step import IMAGES, compiled_step

from convnext_jax import experiment
from convnext_jax.recipes import imagenet_1k


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
    plain = Program(compiled_step().as_text())
    full = Program(compiled_step(augment_config, experiment.build_mixing(config)).as_text())

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
