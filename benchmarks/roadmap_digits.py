"""Every step of the road from ResNet to ConvNeXt trained, small, on the embedded digits.

    python benchmarks/roadmap_digits.py --results roadmap_digits.json --chart roadmap_digits.png

Each network is the road's own with a quarter of its width (--width 16 for ResNet-50's 64) and a
third of its depth, Swin beside them likewise; the digits are enlarged to 32 pixels. All are trained
alike, through the project's own step: AdamW, warm-up, cosine, label smoothing and mixup; but the
first, 00_resnet, by SGD with three rates, as its own recipe has it. Prints top-1 on the 359 digits
held out, mean and standard deviation over the seeds. It shows that every step trains, and says
nothing of ImageNet: such digits are told apart by any of these networks.

What has been trained is kept in the file of --results, network by network and seed by seed; the
same command goes on where it was interrupted.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import jax

from convnext_jax import cli, experiment, recipes
from convnext_jax.data.loader import eval_loader, train_loader
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, list_models
from convnext_jax.models.roadmap_steps import ROADS
from convnext_jax.models.swin import SwinTransformer
from convnext_jax.tables import markdown_table
from convnext_jax.training import sharding
from convnext_jax.training.evaluation import evaluate
from convnext_jax.training.state import abstract_state, create_state
from convnext_jax.training.step import jit_eval_step, jit_train_step, make_eval_step

IMAGE_SIZE = 32  # at which the networks' last maps have one position
DEPTH_DIVISOR = 3
SWIN = {"t": "swin_tiny", "b": "swin_base"}
SWIN_STEPS = 2  # it learns more slowly from so few images, by this factor
RESNET_WIDTH = 64  # of the first step, to which --width is related


def small_arguments(name, width):
    """Arguments that make a network of the registry narrow and shallow."""
    model = create_model(name)

    def narrow(channels):
        return round(channels * width / RESNET_WIDTH)

    depths = tuple(max(1, round(depth / DEPTH_DIVISOR)) for depth in model.depths)
    if isinstance(model, SwinTransformer):
        # Its blocks come in pairs. A third of its heads leaves them 3/4 of their width.
        heads = tuple(max(1, count // DEPTH_DIVISOR) for count in model.num_heads)
        pairs = tuple(max(2, depth) for depth in depths)
        return {"depths": pairs, "num_heads": heads, "width": narrow(model.width), "window_size": 4}
    if hasattr(model, "width"):
        return {"depths": depths, "width": narrow(model.width)}
    return {"depths": depths, "dims": tuple(map(narrow, model.dims))}


def config_of(name, width, steps):
    """What is trained: configs/digits.py's recipe, shorter and on enlarged digits."""
    config = recipes.base()
    config.batch_size = 64
    config.eval_batch_size = 360
    config.model.name = name
    config.model.dtype = "float32"
    config.model.overrides = small_arguments(name, width)
    config.data.name = "digits"
    config.data.image_size = IMAGE_SIZE
    config.data.workers = 0
    config.augment.crop_scale = (0.4, 1.0)
    config.augment.eval_crop_ratio = 1.0
    config.augment.flip = 0.0
    config.augment.policy = ""
    config.augment.erasing_prob = 0.0
    config.augment.mean = (0.305, 0.305, 0.305)
    config.augment.std = (0.376, 0.376, 0.376)
    if name.endswith("/00_resnet"):
        config.mix.mixup_alpha = config.mix.cutmix_alpha = config.mix.label_smoothing = 0.0
        config.optim.name = "sgd"
        config.optim.schedule = "step"
        config.optim.decay_every = f"{steps // 3} steps"
        config.optim.decayed = "all"
        config.optim.learning_rate = 0.05
        config.optim.weight_decay = 1e-4
        config.optim.warmup = "0 steps"
    else:
        if isinstance(create_model(name), SwinTransformer):
            steps *= SWIN_STEPS
        config.mix.mixup_alpha = 0.4
        config.mix.cutmix_alpha = 0.0
        config.mix.group_size = 32
        config.optim.warmup = f"{steps // 5} steps"
    config.total = f"{steps} steps"
    return config


def trained(config, seeds):
    """Trains a network once for each seed: its top-1 on what was held out, and its last loss.

    The step is compiled once, so a seed is that of the initialisation and of the data's order and
    crops; what mixup draws is the same for all.
    """
    source = experiment.open_train_source(config)
    eval_source = experiment.open_eval_source(config, source)
    steps = experiment.durations(config, len(source))
    mesh = sharding.create_mesh(1, 1, jax.devices()[:1])
    model = experiment.build_model(config, source.num_classes, mesh.size)
    optimizer, schedule = experiment.build_optimizer(config, model, steps)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    abstract = abstract_state(model, optimizer, shape, mesh, ema=False)
    step = jit_train_step(
        experiment.build_train_step(config, model, optimizer, schedule, mesh), abstract, mesh
    )
    mean, std = tuple(config.augment.mean), tuple(config.augment.std)
    eval_step = jit_eval_step(make_eval_step(model, mean=mean, std=std), abstract, mesh)
    rows = sharding.batch_sharding(mesh)
    for seed in seeds:
        state = create_state(model, optimizer, shape, mesh, seed=seed, ema=False)
        batches = train_loader(
            source,
            experiment.train_transform(config),
            batch_size=config.batch_size,
            seed=seed,
            start_step=0,
            num_steps=steps.total,
        )
        with contextlib.closing(batches):
            for batch in sharding.prefetch_to_device(batches, rows, ("image", "label")):
                state, metrics = step(state, batch)
                jax.block_until_ready(metrics["loss"])
        held_out = eval_loader(
            eval_source, experiment.eval_transform(config), batch_size=config.eval_batch_size
        )
        with contextlib.closing(held_out):
            fields = ("image", "label", "mask")
            result = evaluate(
                eval_step, state.variables, sharding.prefetch_to_device(held_out, rows, fields)
            )
        yield seed, result["accuracy"], float(metrics["loss"])


class Results:
    """What has been trained so far, in a file that is written after each."""

    def __init__(self, path, settings):
        self._path = path
        self._content = {"settings": settings, "runs": {}}
        if path is None or not path.exists():
            return
        try:
            self._content = json.loads(path.read_text())
            kept = self._content["settings"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} holds no results of this benchmark") from error
        if kept != settings:
            raise UserError(f"{path} holds results of {kept}; give another --results")

    def get(self, name, seed):
        """Accuracy, loss and seconds of a run; None if it has not been made."""
        return self._content["runs"].get(name, {}).get(str(seed))

    def put(self, name, seed, run):
        """Keeps a run."""
        self._content["runs"].setdefault(name, {})[str(seed)] = run
        if self._path is not None:
            draft = self._path.with_name(self._path.name + ".tmp")
            draft.write_text(json.dumps(self._content, indent=1) + "\n")
            draft.replace(self._path)


def table(accuracies):
    """Mean and standard deviation of each network, in percent."""
    rows = []
    for name, values in accuracies.items():
        spread = f"{100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        rows.append(
            [
                name,
                f"{100 * statistics.mean(values):.2f}",
                spread,
                " ".join(f"{100 * value:.2f}" for value in values),
            ]
        )
    return markdown_table(["network", "top-1, mean", "std", "each seed"], rows)


def draw(accuracies, path, title):
    """The curve of means over the steps, with each seed's point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    means = [100 * statistics.mean(values) for values in accuracies.values()]
    on_road = [i for i, name in enumerate(accuracies) if "/" in name]
    axes.plot(on_road, [means[i] for i in on_road], color="#0072B2", linewidth=1.8, label="mean")
    for i, (name, values) in enumerate(accuracies.items()):
        color = "#0072B2" if "/" in name else "#009E73"
        spread = 100 * statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(i, means[i], spread, color=color, marker="o", markersize=6, capsize=4)
        points = [100 * value for value in values]
        axes.plot(
            [i + 0.18] * len(points),  # beside the bar
            points,
            linestyle="none",
            marker="o",
            markersize=3.5,
            fillstyle="none",
            color="#D55E00",
            label="one seed" if i == 0 else None,
            zorder=3,
        )
    labels = [name.rpartition("/")[2].replace("_", " ") for name in accuracies]
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=9)
    axes.set_ylabel("top-1 on 359 digits, %; bars: standard deviation")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main(argv=None):
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="See docs/roadmap.md."
    )
    parser.add_argument("--road", choices=ROADS, default="t")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, as roadmap_t/07_dw_first")
    parser.add_argument("--width", type=int, default=16, help="of ResNet's stem, instead of 64")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps; Swin's are more")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="a JSON file, read and written")
    parser.add_argument("--chart", type=Path, help="a .png or .svg of the curve, replaced")
    arguments = parser.parse_args(argv)
    names = [*list_models(f"roadmap_{arguments.road}/*"), SWIN[arguments.road]]
    unknown = set(arguments.only or ()) - set(names)
    if unknown:
        raise UserError(f"--only: there is no {', '.join(unknown)} among {', '.join(names)}")
    names = [name for name in names if not arguments.only or name in arguments.only]

    settings = {"width": arguments.width, "steps": arguments.steps}
    results = Results(arguments.results, settings)
    begun, made = time.monotonic(), 0
    for name in names:
        missing = [seed for seed in arguments.seeds if results.get(name, seed) is None]
        if not missing:
            continue
        start = time.monotonic()
        config = config_of(name, arguments.width, arguments.steps)
        for seed, accuracy, loss in trained(config, missing):
            # Compilation is the first seed's.
            seconds = time.monotonic() - start
            results.put(name, seed, {"accuracy": accuracy, "loss": loss, "seconds": seconds})
            made += 1
            print(
                f"{name} seed {seed}: {accuracy:.2%}, loss {loss:.3f}, {seconds:.0f} s", flush=True
            )
            start = time.monotonic()

    accuracies = {
        name: [results.get(name, seed)["accuracy"] for seed in arguments.seeds] for name in names
    }
    print(f"\n{made} runs in {(time.monotonic() - begun) / 60:.1f} min; jax {jax.__version__}\n")
    print(table(accuracies))
    if arguments.chart is not None:
        title = f"The road {arguments.road} on digits, {len(arguments.seeds)} seeds, "
        draw(accuracies, arguments.chart, title + f"{arguments.steps} steps")
        print(f"wrote {arguments.chart}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
