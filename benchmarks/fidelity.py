"""How faithful training is to the PyTorch recipe: the tables of docs/fidelity.md.

    python benchmarks/fidelity.py parity --results fidelity.json
    python benchmarks/fidelity.py bfloat16 --results fidelity.json
    python benchmarks/fidelity.py digits --results fidelity.json
    python benchmarks/fidelity.py cifar10 --results fidelity.json --data_dir FOLDER --epochs 10
    python benchmarks/fidelity.py recipe --results fidelity.json --data_dir FOLDER --epochs 10 \
        --workdir runs/fidelity
    python benchmarks/fidelity.py tables --results fidelity.json

FOLDER holds CIFAR-10's training images, one folder a class; a tenth of them, 5,000, is held out.
PyTorch is needed (the extra `parity`), but for `bfloat16`, `recipe` and `tables`.

Every run that ends is kept in the file of --results; the same command goes on where it was
interrupted. `recipe` runs `convnext_jax.train`, which resumes within a run, too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from fidelity_training import PARITY, train_ours, train_torch
from scipy import stats

from convnext_jax import cli, config_files
from convnext_jax.errors import UserError
from convnext_jax.tables import markdown_table
from convnext_jax.training.reporting import read_metrics

ROOT = Path(__file__).resolve().parents[1]
BFLOAT16_STEPS = 500
SMOOTHED_OVER = 25  # steps; a single batch's loss is noise
DIGITS_EPOCHS = 40
SEEDS = {"bfloat16": 3, "digits": 5, "cifar10": 3}

# What makes of a config flip and crop alone (the digits' has no flip), with smoothed labels.
FLIP_AND_CROP = (
    "--config.model.drop_path_rate=0.0",
    "--config.mix.prob=0.0",
    "--config.ema_decay=None",
)
# Of CIFAR-10, a network that two cores train in minutes.
SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128), "patch_size": 2}

MIXING = (
    "--config.mix.prob=1.0",
    "--config.mix.mixup_alpha=0.8",
    "--config.mix.cutmix_alpha=1.0",
    "--config.mix.group_size=128",
)
AUGMENTATION = (
    "--config.augment.policy=rand-m9-mstd0.5-inc1",
    "--config.augment.erasing_prob=0.25",
)
NO_MIXING, NO_DEPTH = "--config.mix.prob=0.0", "--config.model.drop_path_rate=0.0"
# Every one keeps an average besides, which changes no weight; both are evaluated.
ARMS = {
    "flip and crop": (NO_MIXING, NO_DEPTH),
    "+ mixup and cutmix": (*MIXING, NO_DEPTH),
    "+ RandAugment and erasing": (*AUGMENTATION, NO_MIXING, NO_DEPTH),
    "the whole recipe": (*MIXING, *AUGMENTATION, "--config.model.drop_path_rate=0.1"),
}


class Results:
    """What has been made so far: section → run → figures, written after each."""

    def __init__(self, path):
        self._path = path
        self.content = {}
        if path.exists():
            try:
                self.content = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} holds no results; give another --results") from error

    def keep(self, section, run, make):
        """Makes a run unless it is there, and keeps it."""
        runs = self.content.setdefault(section, {})
        if run in runs:
            return
        print(f"{section}: {run}", flush=True)
        runs[run] = make()
        draft = self._path.with_name(self._path.name + ".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self._path)


def make_parity(results, arguments):
    jax.config.update("jax_num_cpu_devices", 8)
    sys.path.insert(0, str(PARITY))
    import training_scenarios

    def compared(a, b):
        comparison = a.against(b)
        return {
            "loss": {str(step): float(comparison.losses[step - 1]) for step in (1, 10, 200)},
            "largest": float(comparison.losses.max()),
            "worst": {kind: comparison.worst(kind) for kind in comparison.tensors},
        }

    def make(name):
        runs = training_scenarios.run(training_scenarios.SCENARIOS[name]())
        truth = runs.arbiter()
        return {
            "ours to PyTorch": compared(runs.ours, runs.torch),
            "ours to float64": compared(runs.ours, truth),
            "PyTorch to float64": compared(runs.torch, truth),
        }

    for name in training_scenarios.SCENARIOS:
        results.keep("parity", name, lambda name=name: make(name))


def parity_tables(runs):
    kinds = ("parameters", "average", "first moment", "second moment")
    rows = []
    for name, pairs in runs.items():
        found = pairs["ours to PyTorch"]
        losses = [f"{found['loss'][step]:.0e}" for step in ("1", "10", "200")]
        worst = [f"{found['worst'][kind][1]:.0e}" for kind in kinds]
        rows.append([name, *losses, f"{found['largest']:.0e}", *worst])
    header = ["scenario", "loss, step 1", "10", "200", "largest", *kinds]
    yield "Ours against PyTorch, both float32", markdown_table(header, rows)

    rows = []
    for name, pairs in runs.items():
        cells = [name]
        for pair in ("ours to float64", "PyTorch to float64"):
            found = pairs[pair]
            tensor = max((found["worst"][kind] for kind in kinds), key=lambda item: item[1])
            cells += [f"{found['largest']:.0e}", f"{tensor[1]:.0e}", tensor[0]]
        rows.append(cells)
    header = ["scenario", "loss", "tensor", "which", "PyTorch's loss", "tensor", "which"]
    yield (
        "Each against PyTorch in float64: largest deviations",
        markdown_table(header, rows, left=(0, 3, 6)),
    )


def make_bfloat16(results, arguments):
    for seed in range(arguments.seeds or SEEDS["bfloat16"]):
        for dtype in ("float32", "bfloat16"):
            overrides = [
                f"--config.total={arguments.steps} steps",
                "--config.optim.warmup=50 steps",
                f"--config.model.dtype={dtype}",
                f"--config.seed={seed}",
            ]
            config = config_files.load_config(str(ROOT / "configs" / "digits.py"), overrides)
            results.keep(
                "bfloat16", f"{dtype}, seed {seed}", lambda config=config: train_ours(config)
            )


def smoothed(losses):
    """Running means over SMOOTHED_OVER steps."""
    return np.convolve(losses, np.full(SMOOTHED_OVER, 1 / SMOOTHED_OVER), mode="valid")


def bfloat16_tables(runs):
    rows, differences = [], {"accuracy": [], "ema_accuracy": []}
    seeds = sorted({name.rpartition(" ")[2] for name in runs}, key=int)
    for seed in seeds:
        pair = [runs.get(f"{dtype}, seed {seed}") for dtype in ("float32", "bfloat16")]
        if None in pair:
            continue
        single, half = pair
        curves = [smoothed(run["losses"]) for run in pair]
        off = np.abs(curves[1] / curves[0] - 1)
        rows.append(
            [
                seed,
                f"{curves[0][-1]:.4f}",
                f"{curves[1][-1]:.4f}",
                f"{100 * off.max():.1f} % at {off.argmax() + SMOOTHED_OVER}",
                f"{100 * off.mean():.2f} %",
                *(
                    f"{100 * run[kind]:.2f}"
                    for kind in ("accuracy", "ema_accuracy")
                    for run in (single, half)
                ),
            ]
        )
        for kind, values in differences.items():
            values.append(100 * (half[kind] - single[kind]))
    header = [
        "seed",
        "float32's last loss",
        "bfloat16's",
        "farthest apart, step",
        "mean distance",
        "top-1, float32",
        "bfloat16",
        "average's, float32",
        "bfloat16",
    ]
    note = "; ".join(
        f"{'raw weights' if kind == 'accuracy' else 'average'} {mean_and_interval(values)} points"
        for kind, values in differences.items()
    )
    yield (
        f"Losses are means over {SMOOTHED_OVER} steps. What bfloat16 adds to top-1: {note}",
        markdown_table(header, rows),
    )


def mean_and_interval(values):
    """Mean ± half the 95 % confidence interval, by Student's t."""
    if len(values) < 2:
        return f"{statistics.mean(values):.2f}" if values else "–"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def make_accuracy(results, arguments):
    which, epochs = arguments.what, arguments.epochs
    if which == "digits":
        path, extra = "digits.py", []
        epochs = epochs or DIGITS_EPOCHS
    else:
        path, extra = "cifar10.py:folder", [f"--config.data.data_dir={arguments.data_dir}"]
    for seed in range(arguments.seeds or SEEDS[which]):
        config = config_files.load_config(
            str(ROOT / "configs" / path),
            [
                *FLIP_AND_CROP,
                *extra,
                f"--config.total={epochs} epochs",
                f"--config.optim.warmup={epochs / 10:g} epochs",
                f"--config.seed={seed}",
            ],
        )
        if which == "cifar10":
            config.model.overrides = SMALL
        for framework, train in (("PyTorch", train_torch), ("ours", train_ours)):
            results.keep(
                f"{which}, {epochs:g} epochs",
                f"{framework}, seed {seed}",
                lambda train=train, config=config: train(config),
            )


def accuracy_tables(section, runs):
    accuracies, rows = {}, []
    for framework in ("PyTorch", "ours"):
        mine = [run for name, run in runs.items() if name.startswith(framework)]
        values = accuracies[framework] = [100 * run["accuracy"] for run in mine]
        if not values:
            return
        rows.append(
            [
                framework,
                mean_and_interval(values),
                " ".join(f"{value:.2f}" for value in values),
                f"{statistics.mean(np.mean(run['losses'][-50:]) for run in mine):.4f}",
                f"{1000 * statistics.median(run['seconds'] for run in mine):.0f}",
            ]
        )
    note = ""
    if min(map(len, accuracies.values())) > 1:
        a, b = accuracies["ours"], accuracies["PyTorch"]
        test = stats.ttest_ind(a, b, equal_var=False)
        interval = test.confidence_interval(0.95)
        note = (
            f". Ours − PyTorch = {statistics.mean(a) - statistics.mean(b):+.2f} points, 95 % "
            f"[{interval.low:+.2f}, {interval.high:+.2f}]; Welch's t = {test.statistic:.2f} of "
            f"{test.df:.1f} degrees of freedom, p = {test.pvalue:.2f}"
        )
    header = ["", "top-1, mean ± 95 %", "each seed", "loss, last 50 steps", "ms a step"]
    yield f"{section}{note}", markdown_table(header, rows)


def make_recipe(results, arguments):
    unknown = [arm for arm in arguments.arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms {unknown[0]!r} is not among {', '.join(map(repr, ARMS))}")
    for arm in arguments.arms:
        workdir = arguments.workdir / arm.replace("+ ", "").replace(" ", "_")
        command = [
            *(sys.executable, "-m", "convnext_jax.train"),
            *("--config", str(ROOT / "configs" / "cifar10.py:folder")),
            *("--workdir", str(workdir)),
            f"--config.data.data_dir={arguments.data_dir}",
            f"--config.total={arguments.epochs:g} epochs",
            f"--config.optim.warmup={arguments.epochs / 10:g} epochs",
            *(f"--config.model.overrides.{key}={value}" for key, value in SMALL.items()),
            *ARMS[arm],
        ]

        def make(command=command, workdir=workdir):
            subprocess.run(command, cwd=ROOT, check=True)
            records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["kind"] == "eval"]
            return {
                "steps": records[-1]["step"],
                **{k: [r[k] for r in records] for k in ("accuracy", "ema_accuracy", "loss")},
            }

        results.keep(f"recipe, {arguments.epochs:g} epochs", arm, make)


def recipe_tables(section, runs):
    rows = [
        [
            arm,
            f"{run['steps']:,}",
            f"{100 * run['accuracy'][0]:.2f}",
            f"{100 * run['accuracy'][-1]:.2f}",
            f"{100 * run['ema_accuracy'][-1]:.2f}",
            f"{run['loss'][-1]:.3f}",
        ]
        for arm, run in runs.items()
    ]
    header = ["", "steps", "top-1, 1st epoch", "last", "the average's", "held-out loss"]
    yield f"{section}, one seed", markdown_table(header, rows)


def tables(content):
    """Title and table of all that has been made."""
    for section, runs in content.items():
        if section == "parity":
            yield from parity_tables(runs)
        elif section == "bfloat16":
            yield from bfloat16_tables(runs)
        elif section.startswith("recipe"):
            yield from recipe_tables(section, runs)
        else:
            yield from accuracy_tables(section, runs)


PROGRAMS = {
    "parity": make_parity,
    "bfloat16": make_bfloat16,
    "digits": make_accuracy,
    "cifar10": make_accuracy,
    "recipe": make_recipe,
}


def main(argv=None):
    """Makes what is missing of one section, and prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=[*PROGRAMS, "tables"])
    parser.add_argument("--results", type=Path, required=True, help="JSON; what is there is kept")
    parser.add_argument("--seeds", type=int, help="how many, from 0")
    parser.add_argument("--epochs", type=float, help="of digits, cifar10 and recipe")
    parser.add_argument("--steps", type=int, default=BFLOAT16_STEPS, help="of bfloat16")
    parser.add_argument("--data_dir", type=Path, help="CIFAR-10's images, a folder a class")
    parser.add_argument("--workdir", type=Path, help="of recipe: where its runs live")
    parser.add_argument(
        "--arms", nargs="+", default=["flip and crop", "the whole recipe"], help="of recipe"
    )
    arguments = parser.parse_args(argv)
    for program, needs in {
        "cifar10": ("data_dir", "epochs"),
        "recipe": ("data_dir", "epochs", "workdir"),
    }.items():
        for option in needs:
            if arguments.what == program and getattr(arguments, option) is None:
                raise UserError(f"{program} needs --{option}")
    results = Results(arguments.results)
    if arguments.what != "tables":
        PROGRAMS[arguments.what](results, arguments)
    for title, table in tables(results.content):
        print(f"\n{title}\n\n{table}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
