"""ResNet against torchvision's, live: outputs, gradients and running averages.

With `-s` each case prints a line: its greatest relative errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from convnext_jax.convert.layouts import collection_of
from convnext_jax.convert.layouts.resnet import TORCHVISION
from convnext_jax.models import ModernizedResNet, create_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

from torchvision_operators import define_missing_operators  # noqa: E402  (it needs PyTorch)

define_missing_operators()
resnet = pytest.importorskip("torchvision.models.resnet")

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def reference(depths, seed):
    """A torchvision ResNet in which no tensor is constant, nor near its initial values."""
    torch.manual_seed(seed)
    model = resnet.ResNet(resnet.Bottleneck, list(depths), num_classes=10)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0.0, 0.3)
            elif tensor.ndim == 1:
                tensor.normal_(1.0, 0.3)
    return model


def variables_of(tensors):
    """A state dict, or gradients by its names, as Flax's collections."""
    flat = {}
    for name, tensor in tensors.items():
        if TORCHVISION.is_derived(name):
            continue
        path, transform = TORCHVISION.find(name)
        value = jnp.asarray(transform.forward(tensor.detach().numpy().copy()))
        flat[(collection_of(path), *path.split("/"))] = value
    return traverse_util.unflatten_dict(flat)


def images(height, width, batch):
    shape = (batch, height, width, 3)
    return np.random.default_rng(height).normal(size=shape).astype(np.float32)


def nchw(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def error(ours, theirs):
    """The greatest difference relative to the greatest value, over one or more arrays."""
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in leaves)


@pytest.mark.parametrize("size", [(224, 224), (225, 193), (64, 97)])
def test_inference(size):
    theirs = reference((3, 4, 6, 3), seed=1).eval()
    variables = variables_of(theirs.state_dict())
    model = create_model("resnet50", num_classes=10)
    x = images(*size, batch=2)
    expected_shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected_shapes)

    maps = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda *a: maps.append(a[-1].permute(0, 2, 3, 1).numpy()))
    with torch.no_grad():
        logits = theirs(nchw(x)).numpy()

    @jax.jit
    def outputs(variables, x):
        features = model.apply(variables, x, method="feature_maps")
        return model.apply(variables, x), features

    our_logits, our_maps = outputs(variables, x)
    errors = error(our_logits, logits), error(our_maps, tuple(maps))
    print(f"\nResNet-50, {size}: logits {errors[0]:.1e}, maps {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE


def test_training():
    """With GELU: where a ReLU's input is within rounding of 0, its gradient is either's guess."""
    depths = (1, 2, 1, 1)
    theirs = reference(depths, seed=2).train().double()
    for module in theirs.modules():
        if hasattr(module, "relu"):
            module.relu = torch.nn.GELU()
    variables = variables_of({k: t.float() for k, t in theirs.state_dict().items()})
    model = ModernizedResNet(depths=depths, activation="gelu", num_classes=10)
    x = images(64, 48, batch=6)
    weight = np.random.default_rng(3).normal(size=(6, 10)).astype(np.float32)

    @jax.jit
    def step(params, batch_stats):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return (logits * weight).sum(), (logits, updated["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    gradients, (our_logits, our_averages) = step(**variables)

    logits = theirs(nchw(x).double())
    (logits * torch.from_numpy(weight)).sum().backward()
    averages = variables_of({k: t.float() for k, t in theirs.state_dict().items()})["batch_stats"]
    their_gradients = variables_of({k: p.grad for k, p in theirs.named_parameters()})["params"]
    errors = {
        "logits": error(our_logits, logits.detach().numpy()),
        "running averages": error(our_averages, averages),
        "gradients": error(gradients, their_gradients),
    }
    print("\ntraining: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    # The step must have moved them, or their agreement would say nothing.
    assert error(variables["batch_stats"], averages) > 0.01
    assert errors["logits"] <= TOLERANCE
    assert errors["running averages"] <= TOLERANCE
    assert errors["gradients"] <= GRADIENT_TOLERANCE
