"""Trains a ConvNeXt: python -m convnext_jax.train --config configs/tiny.py --workdir runs/tiny.

The whole run, from top to bottom. What it carries from step to step is one `TrainState`; everything
else (the batch, the randomness, the learning rate) is a function of the config and the step's
number, which is why a run that is killed and started again goes on exactly where its last
checkpoint was.
"""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from convnext_jax import cli, experiment
from convnext_jax.convert.stored import find_weights
from convnext_jax.data.loader import eval_loader, train_loader
from convnext_jax.errors import RunStoppedError, UserError
from convnext_jax.start_up import start_up_report
from convnext_jax.training import sharding
from convnext_jax.training.checkpoints import Checkpointer
from convnext_jax.training.evaluation import evaluate
from convnext_jax.training.init_from import StoredWeights, start_from
from convnext_jax.training.reporting import Reporter
from convnext_jax.training.state import TrainState, abstract_state, create_state
from convnext_jax.training.step import (
    jit_eval_step,
    jit_train_step,
    make_eval_step,
    make_train_step,
)
from convnext_jax.training.workdir import check_config

# Fields that a run may change between stops: they decide when it speaks and how fast it is, not
# what it computes.
FREE_FIELDS = ("log_every", "checkpoints_kept", "data.workers", "data.data_dir", "eval_batch_size")

# Steps given to the devices ahead of the one whose result is awaited. More would only pin batches.
STEPS_IN_FLIGHT = 2


def train(
    config: ConfigDict, workdir: str | Path, *, allow_config_change: bool = False
) -> dict[str, Any]:
    """Trains, evaluates and keeps checkpoints; resumes what lies in `workdir`.

    Args:
      config: the run; fields as in `recipes.base()`.
      workdir: where checkpoints, logs and curves go, and come from when a run is resumed.
      allow_config_change: go on although the workdir was begun with another config or data set.

    Returns:
      "step", "skipped" (steps left out as not finite), and the last evaluation's metrics, if this
      call made one.

    Raises:
      UserError: for a mistake in the config, the data or the workdir.
      RunStoppedError: at a loss or gradient that is not finite, unless the config skips such steps.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; give a directory")
    process, processes = jax.process_index(), jax.process_count()

    # Data. Opened first, since most mistakes are made there.
    source = experiment.open_train_source(config)
    eval_source = experiment.open_eval_source(config, source)
    steps = experiment.durations(config, len(source))
    mixing = experiment.build_mixing(config)
    augmentation = experiment.build_augmentation(config)

    # Devices, model, optimizer.
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
    experiment.check_batch_sizes(config, mesh.size)
    model = experiment.build_model(config, source.num_classes)
    optimizer, schedule = experiment.build_optimizer(config, model, steps)
    image_shape = (config.data.image_size, config.data.image_size, 3)
    abstract = abstract_state(model, optimizer, image_shape, mesh, ema=config.ema_decay is not None)

    transform = experiment.train_transform(config)
    if config.init_from == "":
        raise UserError(
            "this recipe fine-tunes: say from what by --config.init_from=WEIGHTS (a converted or "
            "foreign checkpoint, or the workdir of a run), or --config.init_from=None to start "
            "from random weights"
        )
    settings = config.to_dict()
    score = "ema_accuracy" if config.ema_decay is not None else "accuracy"
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        max_to_keep=config.checkpoints_kept,
        best_metric="score",
    )
    with contextlib.ExitStack() as exits:
        exits.enter_context(checkpointer)
        # The workdir must be this run's own. One without a checkpoint holds nothing that another
        # config could spoil, so a run that failed at once may be corrected.
        check_config(
            workdir,
            settings,
            allow=allow_config_change or checkpointer.latest_step() is None,
            ignore=FREE_FIELDS,
            how_to_allow="give --allow_config_change",
        )
        # State: the newest whole checkpoint, or a fresh one, under its shardings from the start.
        identity = {"train": source.identity} | (
            {"eval": eval_source.identity} if eval_source is not None else {}
        )
        restored = checkpointer.restore(abstract)
        if restored is not None:
            state, start, chrono_state = restored.state, restored.step, restored.metadata["chrono"]
            experiment.check_identity(
                restored.metadata["data"], identity, allow=allow_config_change
            )
        else:
            state = create_state(
                model,
                optimizer,
                image_shape,
                mesh,
                seed=config.seed,
                ema=abstract.ema_params is not None,
            )
            start, chrono_state = 0, None
            if config.init_from is not None:
                state = start_from(state, _weights_to_start_from(config))

        reporter = Reporter(
            workdir,
            is_primary=process == 0,
            total_steps=steps.total,
            steps_per_epoch=steps.steps_per_epoch,
            batch_size=config.batch_size,
            device_count=jax.device_count(),
            start_step=start,
            chrono_state=chrono_state,
        )
        exits.callback(reporter.close)
        reporter.start_up(
            start_up_report(
                config, model, mesh, source, eval_source, steps, start=start, workdir=workdir
            )
        )

        if start == steps.total:
            reporter.message(
                f"this run is finished: config.total is {config.total!r}. To train on, give "
                "another --workdir, or a larger config.total and --allow_config_change\n"
            )

        train_step = jit_train_step(
            make_train_step(
                model,
                optimizer,
                schedule,
                num_classes=model.num_classes,
                mix_config=mixing,
                seed=config.seed,
                ema_decay=config.ema_decay,
                accumulation_steps=config.optim.accumulation_steps,
                augment_config=augmentation,
                mesh=mesh,
            ),
            abstract,
            mesh,
        )
        eval_step = jit_eval_step(
            make_eval_step(model, mean=tuple(config.augment.mean), std=tuple(config.augment.std)),
            abstract,
            mesh,
        )
        batch_sharding = sharding.batch_sharding(mesh)
        loading = {
            "process_index": process,
            "process_count": processes,
            "num_workers": config.data.workers,
            "on_bad_image": config.data.on_bad_image,
        }

        def evaluate_state(state: TrainState) -> dict[str, float]:
            assert eval_source is not None
            host_batches = eval_loader(
                eval_source,
                experiment.eval_transform(config),
                batch_size=config.eval_batch_size,
                **loading,
            )
            with contextlib.closing(host_batches):
                fields = ("image", "label", "mask")
                batches = sharding.prefetch_to_device(host_batches, batch_sharding, fields)
                return evaluate(eval_step, state.params, batches, state.ema_params)

        # The loop. Metrics stay on the devices until they are wanted.
        chrono = reporter.chrono
        recent: list[tuple[int, dict[str, jax.Array]]] = []
        host_batches = train_loader(
            source,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start,
            num_steps=steps.total,
            repeats=config.data.repeats,
            **loading,
        )

        def report_recent() -> None:
            fetched = [(done, jax.device_get(metrics)) for done, metrics in recent]
            recent.clear()
            bad = [(done, metrics) for done, metrics in fetched if not metrics["finite"]]
            if bad and config.on_nonfinite == "stop":
                checkpointer.wait()
                raise RunStoppedError(_nonfinite_message(*bad[0], checkpointer))
            good = [metrics for _, metrics in fetched if metrics["finite"]]
            line = {
                "loss": float(np.mean([m["loss"] for m in good])) if good else float("nan"),
                "grad_norm": float(good[-1]["grad_norm"]) if good else float("nan"),
                "learning_rate": float(fetched[-1][1]["learning_rate"]),
            }
            if bad:
                line["skipped"] = len(bad)
                reporter.message(
                    f"left out {len(bad)} of the last {len(fetched)} steps, step {bad[0][0]} the "
                    "first: their loss or gradient was not finite"
                )
            if host_batches.bad_images:
                line["bad_images"] = len(host_batches.bad_images)
            reporter.train(fetched[-1][0], line)

        metrics: dict[str, float] = {}
        with contextlib.closing(host_batches):
            batches = sharding.prefetch_to_device(host_batches, batch_sharding, ("image", "label"))
            for step in range(start, steps.total):
                with chrono.waiting_for_data():
                    batch = next(batches)
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, batch)
                done = step + 1
                recent.append((done, step_metrics))
                if step == start:
                    # The compilation ends here, and counts neither for the pace nor for the ETA.
                    jax.block_until_ready(step_metrics)
                    compiling = chrono.lap(done)
                    reporter.message(f"first step after {compiling.seconds:.0f} s, compiled")
                elif len(recent) > STEPS_IN_FLIGHT:
                    jax.block_until_ready(recent[-1 - STEPS_IN_FLIGHT][1])

                last = done == steps.total
                evaluating = eval_source is not None and (last or done % steps.eval_every == 0)
                saving = last or done % steps.checkpoint_every == 0
                if evaluating or saving or done % steps.log_every == 0:
                    report_recent()
                with chrono.pause():
                    if evaluating:
                        metrics = evaluate_state(state)
                        reporter.evaluation(done, metrics)
                    if saving:
                        checkpointer.save(
                            done,
                            state,
                            metadata={
                                "config": settings,
                                "num_classes": model.num_classes,
                                "data": identity,
                                "class_names": source.class_names,
                                "chrono": chrono.state(),
                            },
                            metrics={**metrics, "score": metrics[score]} if evaluating else None,
                        )
            checkpointer.wait()
            skipped = int(jax.device_get(state.skipped))
            reporter.finish(
                ({"steps left out": f"{skipped:,}, not finite"} if skipped else {})
                | {"checkpoints": checkpointer.directory}
            )
    return {"step": steps.total, "skipped": skipped, **metrics}


def _weights_to_start_from(config: ConfigDict) -> StoredWeights:
    try:
        return find_weights(config.init_from)
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error


def _nonfinite_message(
    done: int, metrics: Mapping[str, np.ndarray], checkpointer: Checkpointer
) -> str:
    last = checkpointer.latest_step()
    where = (
        f"the last good checkpoint is that of step {last} in {checkpointer.directory}"
        if last is not None
        else "no checkpoint had been written yet"
    )
    return (
        f"step {done}: the loss is {metrics['loss']}, the gradient's norm {metrics['grad_norm']}; "
        f"{where}. Start again with --allow_config_change and a lower "
        "--config.optim.learning_rate, or --config.on_nonfinite=skip to leave such steps out"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The program; `argv` are the arguments after its name."""
    parser = argparse.ArgumentParser(
        prog="python -m convnext_jax.train",
        description="Train a ConvNeXt. A workdir that holds checkpoints is resumed.",
        epilog="Any field of the config is set by --config.FIELD=VALUE, for example "
        "--config.optim.learning_rate=1e-3 --config.total='50 epochs'.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, help="for checkpoints, logs and curves")
    parser.add_argument(
        "--allow_config_change",
        action="store_true",
        help="go on in a workdir that was begun with another config or data set",
    )
    arguments, overrides = parser.parse_known_args(argv)
    config = cli.load_config(arguments.config, overrides)
    return train(config, arguments.workdir, allow_config_change=arguments.allow_config_change)


if __name__ == "__main__":
    sys.exit(cli.run(main))
