"""Trains a network: python -m convnext_jax.train --config configs/tiny.py --workdir runs/tiny.

The whole run, from top to bottom. What it carries from step to step is one `TrainState`; everything
else (the batch, the randomness, the learning rate) is a function of the config and the step's
number, which is why a run that is killed and started again goes on exactly where its last
checkpoint was.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from convnext_jax import cli, config_checks, config_files, experiment, recipes
from convnext_jax.compilation_cache import CacheHits, use_compilation_cache
from convnext_jax.distributed import joining
from convnext_jax.next_steps import next_steps
from convnext_jax.start_up import start_up_report
from convnext_jax.training import profiling, sharding
from convnext_jax.training.checkpoints import Checkpointer
from convnext_jax.training.init_from import start_from
from convnext_jax.training.loss_guard import LossGuard
from convnext_jax.training.preemption import Preemption
from convnext_jax.training.reporting import TENSORBOARD_DIR, Reporter
from convnext_jax.training.save_policy import SavePolicy
from convnext_jax.training.sharding_check import replication_warning
from convnext_jax.training.state import abstract_state, create_state
from convnext_jax.training.step import jit_train_step
from convnext_jax.training.step_log import StepLog
from convnext_jax.training.workdir import check_config, local_workdir

_EXAMPLES = """
the handwritten digits, which need no data set
  python -m convnext_jax.train --config configs/digits.py --workdir runs/digits
ConvNeXt-T on ImageNet, with other values for two fields
  python -m convnext_jax.train --config configs/tiny.py --workdir runs/tiny \\
    --config.optim.learning_rate=1e-3 --config.total='50 epochs'
your own photographs, from published weights
  python -m convnext_jax.train --config configs/finetune_folder.py --workdir runs/photos \\
    --config.data.data_dir=PHOTOS --config.init_from=convnext_tiny_22k_224.pth
where the time of a step goes, for xprof or TensorBoard
  python -m convnext_jax.train --config configs/digits.py --workdir runs/traced \\
    --config.total='20 steps' --config.optim.warmup='1 step' --profile steps=10:15
"""

# Steps given to the devices ahead of the one whose result is awaited. More would only pin batches.
STEPS_IN_FLIGHT = 2


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    allow_config_change: bool = False,
    profile: range | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and keeps checkpoints; resumes what lies in `workdir`.

    Args:
      config: the run; fields as in `recipes.base()`.
      workdir: where checkpoints, logs and curves go, and come from when a run is resumed.
      allow_config_change: go on although the workdir was begun with another config or data set.
      profile: numbers of the steps that a trace is made of; see `training/profiling.py`.

    Returns:
      "step", "skipped" (steps left out as not finite), and the last evaluation's metrics, if this
      call made one.

    Raises:
      UserError: for a mistake in the config, the data or the workdir.
      RunInterruptedError: when the platform announced that it will stop this process; all has been
        saved by then.
      RunStoppedError: at a loss or gradient that is not finite, unless the config skips such steps;
        at a long spike of the loss, or a checkpoint that can't be written, if the config says so.
    """
    workdir = local_workdir(workdir)

    # Data. Opened first, since most mistakes are made there.
    source = experiment.open_train_source(config)
    eval_source = experiment.open_eval_source(config, source)
    steps = experiment.durations(config, len(source))
    profiling.check_steps(profile, steps.total)

    # Devices, model, optimizer.
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
    experiment.check_batch_sizes(config, mesh.size)
    model = experiment.build_model(config, source.num_classes, mesh.size)
    experiment.check_kernels(model, mesh)
    optimizer, schedule = experiment.build_optimizer(config, model, steps)
    image_shape = (config.data.image_size, config.data.image_size, 3)
    averaged = config.ema_decay is not None
    abstract = abstract_state(model, optimizer, image_shape, mesh, ema=averaged)

    transform = experiment.train_transform(config)
    experiment.check_init_from(config)
    settings = config.to_dict()
    score = "ema_accuracy" if averaged else "accuracy"
    checkpointer = Checkpointer(
        workdir / "checkpoints", max_to_keep=config.checkpoints_kept, best_metric="score"
    )
    with contextlib.ExitStack() as exits:
        preemption = exits.enter_context(Preemption())
        exits.enter_context(checkpointer)
        # The workdir must be this run's own. One without a checkpoint holds nothing that another
        # config could spoil, so a run that failed at once may be corrected.
        check_config(
            workdir,
            settings,
            allow=allow_config_change or checkpointer.latest_step() is None,
            ignore=config_checks.FREE_FIELDS,
            defaults=recipes.base().to_dict(),
            how_to_allow="give --allow_config_change",
        )
        # State: the newest whole checkpoint, or a fresh one, under its shardings from the start.
        identity = {"train": source.identity} | (
            {"eval": eval_source.identity} if eval_source is not None else {}
        )
        restored = checkpointer.restore(abstract)
        if restored is not None:
            state, start, beside = restored.state, restored.step, restored.metadata
            experiment.check_identity(beside["data"], identity, allow=allow_config_change)
        else:
            state = create_state(
                model, optimizer, image_shape, mesh, seed=config.seed, ema=averaged
            )
            start, beside = 0, {}
            if (weights := experiment.find_initial_weights(config)) is not None:
                state = start_from(state, weights)

        reporter = Reporter(
            workdir,
            is_primary=jax.process_index() == 0,
            total_steps=steps.total,
            steps_per_epoch=steps.steps_per_epoch,
            batch_size=config.batch_size,
            device_count=jax.device_count(),
            start_step=start,
            chrono_state=beside.get("chrono"),
        )
        exits.callback(reporter.close)
        reporter.start_up(
            start_up_report(
                config, model, mesh, source, eval_source, steps, start=start, workdir=workdir
            )
        )

        if (warning := replication_warning(abstract, mesh)) is not None:
            reporter.message(f"warning: {warning}")

        if start == steps.total and not beside.get("evaluation_due"):
            reporter.message(
                f"this run is finished: config.total is {config.total!r}. To train on, give "
                "another --workdir, or a larger config.total and --allow_config_change\n"
            )

        train_step = jit_train_step(
            experiment.build_train_step(config, model, optimizer, schedule, mesh), abstract, mesh
        )
        evaluate_state = experiment.build_evaluation(
            config, model, abstract, mesh, eval_source, preemption.reached
        )

        # What a stop or a kill must not lose lies in the checkpoint, beside the state.
        chrono = reporter.chrono
        log = StepLog(beside.get("log", ()))
        guard = LossGuard(
            stop_at_nonfinite=config.on_nonfinite == "stop",
            spike_factor=config.spike_factor,
            spike_steps=config.spike_steps,
            state=beside.get("guard"),
        )
        saves = SavePolicy(checkpointer, on_failure=config.on_save_failure, tell=reporter.message)

        def check_losses() -> None:
            for done, step_metrics in log.fetch():
                if (wrong := guard.check(done, step_metrics)) is not None:
                    raise saves.stop(wrong)

        def report_losses() -> None:
            report = log.report()
            line = dict(report.metrics)
            if report.left_out:
                line["skipped"] = len(report.left_out)
                reporter.message(
                    f"left out {len(report.left_out)} of the last {report.steps} steps, step "
                    f"{report.left_out[0]} the first: their loss or gradient was not finite"
                )
            if host_batches.bad_images:
                line["bad_images"] = len(host_batches.bad_images)
            reporter.train(report.done, line)

        metrics: dict[str, float] = {}
        if beside.get("evaluation_due"):
            # The run was stopped in the middle of it.
            evaluated = evaluate_state(state)
            if evaluated is None:
                raise saves.interruption()
            metrics = evaluated
            reporter.evaluation(start, metrics)
            checkpointer.add_metrics(start, {**metrics, "score": metrics[score]})

        host_batches = experiment.train_batches(
            config, source, transform, start_step=start, num_steps=steps.total
        )
        profiler = profiling.StepProfiler(
            profile,
            workdir / TENSORBOARD_DIR,
            start_step=start,
            tell=reporter.message,
            pause=chrono.pause,
        )
        exits.callback(profiler.close)
        cached = exits.enter_context(CacheHits())
        with contextlib.closing(host_batches):
            batches = sharding.prefetch_to_device(
                host_batches, sharding.batch_sharding(mesh), ("image", "label")
            )
            for done in range(start + 1, steps.total + 1):
                with profiler.step(done, state):
                    with chrono.waiting_for_data():
                        batch = next(batches)
                    with jax.transfer_guard("disallow"):
                        state, step_metrics = train_step(state, batch)
                log.append(done, step_metrics)
                if done == start + 1:
                    # The compilation ends here, and counts neither for the pace nor for the ETA.
                    jax.block_until_ready(step_metrics)
                    how = "from the compilation cache" if cached.all else "compiled"
                    reporter.message(f"first step after {chrono.lap(done).seconds:.0f} s, {how}")
                log.hold_back(STEPS_IN_FLIGHT)

                last = done == steps.total
                evaluating = eval_source is not None and (last or done % steps.eval_every == 0)
                saving = last or done % steps.checkpoint_every == 0
                reporting = evaluating or saving or done % steps.log_every == 0
                stopping = preemption.reached()
                if reporting or stopping:
                    check_losses()
                if reporting:
                    report_losses()
                profiler.finish(done, state)
                with chrono.pause():
                    evaluated = None
                    if evaluating and not stopping:
                        evaluated = evaluate_state(state)
                        stopping = evaluated is None
                    if evaluated is not None:
                        metrics = evaluated
                        reporter.evaluation(done, metrics)
                    if saving or stopping:
                        saves.save(
                            done,
                            state,
                            metadata={
                                "config": settings,
                                "num_classes": model.num_classes,
                                "data": identity,
                                "class_names": source.class_names,
                                "chrono": chrono.state(),
                                "guard": guard.state(),
                                "log": log.state(),
                                "evaluation_due": evaluating and evaluated is None,
                            },
                            metrics=evaluated and {**evaluated, "score": evaluated[score]},
                            last=last or stopping,
                        )
                if stopping:
                    raise saves.interruption()
            saves.wait()
            skipped = int(jax.device_get(state.skipped))
            reporter.finish(
                ({"steps left out": f"{skipped:,}, not finite"} if skipped else {})
                | {"checkpoints": checkpointer.directory},
                next_steps(config, model, workdir),
            )
    return {"step": steps.total, "skipped": skipped, **metrics}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "train",
        "Train a network. A workdir that holds checkpoints is resumed.",
        _EXAMPLES,
        "Any field of the config is set by --config.FIELD=VALUE, and an argument of the network by "
        "--config.model.overrides.ARGUMENT=VALUE; recipes.py lists the fields.",
    )
    cli.add_config_argument(parser)
    parser.add_argument("--workdir", required=True, help="for checkpoints, logs and curves")
    parser.add_argument(
        "--allow_config_change",
        action="store_true",
        help="go on in a workdir that was begun with another config or data set",
    )
    parser.add_argument(
        "--profile",
        metavar="steps=A:B",
        help="write a trace of steps A to B - 1 for xprof and TensorBoard, A from 2",
    )
    joining.add_arguments(parser)
    arguments, overrides = parser.parse_known_args(argv)
    profile = None if arguments.profile is None else profiling.parse_steps(arguments.profile)
    config = config_files.load_config(arguments.config, overrides)
    with joining.joined(arguments):
        use_compilation_cache()
        return train(
            config,
            arguments.workdir,
            allow_config_change=arguments.allow_config_change,
            profile=profile,
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
