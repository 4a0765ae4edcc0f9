"""Optimizers, losses and schedules against those that published results were trained with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax import comparison_recipes, experiment
from convnext_jax.data.mixing import smooth_one_hot
from convnext_jax.training import optim
from convnext_jax.training.losses import binary_cross_entropy, soft_target_cross_entropy
from convnext_jax.training.schedule import warmup_cosine

torch = pytest.importorskip("torch")

from torchvision_operators import define_missing_operators  # noqa: E402  (it needs PyTorch)

define_missing_operators()
timm_loss = pytest.importorskip("timm.loss")
timm_optim = pytest.importorskip("timm.optim")
timm_sampler = pytest.importorskip("timm.data.distributed_sampler")
timm_scheduler = pytest.importorskip("timm.scheduler")

pytestmark = pytest.mark.parity

STEPS = 30
SHAPES = {"stem": (3, 3, 4, 8), "norm": (8,), "bias": (8,), "zeros": (4, 4), "head": (8, 5)}
DECAYED = ("stem", "zeros", "head")


def draws():
    """Parameters, and the gradients of all steps, some of which are large enough to be clipped."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    params["zeros"][:] = 0
    gradients = [
        {
            name: (scale * rng.normal(size=shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        for scale in 10.0 ** rng.uniform(-4, 1, STEPS)
    ]
    return params, gradients


def rates(peak):
    return [peak * (i + 1) / STEPS for i in range(STEPS)]


def ours(make, peak):
    params, gradients = draws()
    table = jnp.asarray(rates(peak), jnp.float32)
    tx = make(lambda count: table[count])
    params = jax.tree.map(jnp.asarray, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def theirs(make, peak, decay, decayed):
    params, gradients = draws()
    tensors = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    groups = [
        {"params": [t for name, t in tensors.items() if name in decayed], "weight_decay": decay},
        {"params": [t for name, t in tensors.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = make([group for group in groups if group["params"]])
    for rate, gradient in zip(rates(peak), gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name])
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def assert_close(found, expected):
    start, _ = draws()
    for name in SHAPES:
        moved = np.abs(expected[name] - start[name]).max()
        apart = np.abs(found[name] - expected[name]).max()
        print(f"{name}: moved by {moved:.2g}, apart by {apart:.2g}")
        # LAMB hardly moves what began at zero.
        assert moved > 1e-4
        assert apart < min(2e-6, 1e-3 * moved), name


@pytest.mark.parametrize("always_adapt", [False, True])
@pytest.mark.parametrize("decay", [0.02, 0.0])
def test_lamb_is_timms(decay, always_adapt):
    found = ours(
        lambda rate: optim.lamb(rate, weight_decay=decay, always_adapt=always_adapt), peak=5e-3
    )
    # Its own eps and clipping are what is compared, so they stay at their defaults.
    expected = theirs(
        lambda groups: timm_optim.Lamb(groups, lr=1.0, always_adapt=always_adapt),
        peak=5e-3,
        decay=decay,
        decayed=DECAYED,
    )
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "decayed"),
    [(0.9, False, SHAPES), (0.9, True, SHAPES), (0.0, False, SHAPES), (0.9, False, DECAYED)],
)
def test_sgd_is_pytorchs(momentum, nesterov, decayed):
    mask = optim.all_mask if decayed is SHAPES else optim.decay_mask
    found = ours(
        lambda rate: optim.sgd(
            rate, weight_decay=1e-2, decayed=mask, momentum=momentum, nesterov=nesterov
        ),
        peak=0.01,
    )
    expected = theirs(
        lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=nesterov),
        peak=0.01,
        decay=1e-2,
        decayed=decayed,
    )
    assert_close(found, expected)


def test_adamw_is_pytorchs():
    found = ours(
        lambda rate: optim.adamw(rate, depths=(1,), weight_decay=0.05, clip_norm=None), peak=4e-3
    )
    expected = theirs(
        lambda groups: torch.optim.AdamW(groups, lr=1.0), peak=4e-3, decay=0.05, decayed=DECAYED
    )
    assert_close(found, expected)


def logits_and_targets(smoothing):
    rng = np.random.default_rng(1)
    logits = (5 * rng.normal(size=(16, 10))).astype(np.float32)
    labels = rng.integers(0, 10, 16)
    one_hot = np.asarray(smooth_one_hot(jnp.asarray(labels), 10, smoothing))
    # λ of .2 and .8 too: on both sides of the threshold within a rounding, were they not float32.
    lam = np.linspace(0, 1, 16, dtype=np.float32)[:, None]
    return logits, labels, one_hot, one_hot * lam + one_hot[::-1] * (1 - lam)


def compare(loss, their_loss, logits, targets, their_targets):
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), jnp.asarray(targets))
    tensor = torch.tensor(logits, requires_grad=True)
    their_value = their_loss(tensor, torch.tensor(np.asarray(their_targets)))
    their_value.backward()
    np.testing.assert_allclose(value, their_value.detach().numpy(), rtol=2e-6)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing, threshold, sum_classes):
    logits, labels, one_hot, mixed = logits_and_targets(smoothing)

    def loss(logits, targets):
        # Behind the threshold nothing is smoothed in timm.
        return binary_cross_entropy(
            logits, targets, target_threshold=threshold, sum_classes=sum_classes
        )

    their_loss = timm_loss.BinaryCrossEntropy(
        smoothing=smoothing, target_threshold=threshold, sum_classes=sum_classes
    )
    compare(loss, their_loss, logits, mixed, mixed)
    # Unmixed: theirs makes the soft targets of labels, ours come from the mixing's function.
    compare(loss, their_loss, logits, one_hot, labels)


def test_cross_entropy_is_timms():
    logits, labels, one_hot, mixed = logits_and_targets(0.1)
    compare(soft_target_cross_entropy, timm_loss.SoftTargetCrossEntropy(), logits, mixed, mixed)
    compare(
        soft_target_cross_entropy,
        timm_loss.LabelSmoothingCrossEntropy(0.1),
        logits,
        one_hot,
        labels,
    )


@pytest.mark.parametrize(("epochs", "peak"), [(600, 5e-3), (300, 5e-3), (100, 8e-3)])
def test_timms_cosine_goes_by_epochs_and_does_not_wait_for_the_warmup(epochs, peak):
    # docs/recipes.md gives these differences.
    warmup, steps = 5, 625
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = timm_scheduler.CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=1e-6, warmup_t=warmup, warmup_lr_init=1e-4
    )
    their_rates = np.array([scheduler._get_lr(epoch)[0] for epoch in range(epochs)])
    schedule = jax.vmap(warmup_cosine(peak, 1e-6, warmup * steps, epochs * steps))
    at_starts = np.asarray(schedule(jnp.arange(epochs) * steps))
    # Where the warm-up ends theirs has left the peak already.
    assert their_rates[warmup] < at_starts[warmup] == np.float32(peak)
    later = np.abs(their_rates - at_starts)[warmup:].max() / peak
    assert later == pytest.approx({600: 0.0076, 300: 0.0153, 100: 0.0466}[epochs], abs=1e-4)


def test_an_epoch_of_repeated_augmentation_has_as_many_rows_as_any_other():
    # Three copies of a third of the images, on the four GPUs together.
    size, gpus = 2_567, 4
    samplers = [
        timm_sampler.RepeatAugSampler(range(size), num_replicas=gpus, rank=rank)
        for rank in range(gpus)
    ]
    rows = np.array([list(sampler) for sampler in samplers])
    assert rows.size == 2_560  # whole times 256
    assert len(np.unique(rows)) == 854  # of 2,567: a third
    assert all(len(set(column)) == len(column) for column in rows[:, :200])  # copies on other GPUs
    config = comparison_recipes.strikes_back("a2", "resnet50")
    with config.unlocked():
        config.batch_size, config.mix.group_size = 128 * 3, 96
    steps = experiment.durations(config, size)
    assert steps.steps_per_epoch == size // 384
    assert abs(steps.steps_per_epoch * config.batch_size - rows.size) < 384
