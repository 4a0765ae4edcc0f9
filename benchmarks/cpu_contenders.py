"""What `cpu.py` sets against each other, each in a process of its own.

    python benchmarks/cpu_contenders.py timm-compiled training --batch_size 8

writes a line when it is ready, with the versions it runs on, and then for every line that it reads
makes one pass and writes how many seconds that took.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

CLASSES = 1000


def jax_call(plain, mode, images_shape, overrides):
    """This library's ConvNeXt-T, or that of Flax's layers."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax_training import training_step
    from plain_flax import plain_flax

    from convnext_jax import compiler_options
    from convnext_jax.models import create_model
    from convnext_jax.training.optim import adamw

    model = create_model("convnext_tiny", num_classes=CLASSES, drop_path_rate=0.1, **overrides)
    images = jax.random.normal(jax.random.key(1), images_shape)
    labels = jnp.arange(images_shape[0]) % CLASSES

    with plain_flax() if plain else contextlib.nullcontext():
        params = jax.jit(lambda key: model.init(key, images[:1])["params"])(jax.random.key(0))
        if mode == "inference":
            options = {} if plain else compiler_options.for_network()
            forward = jax.jit(lambda params, images: model.apply({"params": params}, images))
            compiled = forward.lower(params, images).compile(compiler_options=options)
            return lambda: jax.block_until_ready(compiled(params, images)), {"jax": jax}
        optimizer = (
            optax.adamw(1e-4, weight_decay=0.05)
            if plain
            else adamw(lambda _: 1e-4, depths=model.depths, weight_decay=0.05)
        )
        initial, step = training_step(model, optimizer)
        state = [initial(params)]
        options = {} if plain else compiler_options.for_network()
        lowered = jax.jit(step, donate_argnums=0).lower(state[0], images, labels)
        compiled = lowered.compile(compiler_options=options)

    def call():
        state[0], loss = compiled(state[0], images, labels)
        jax.block_until_ready((state[0], loss))

    return call, {"jax": jax}


def keras_call(mode, images_shape):
    """keras.applications' ConvNeXt-T on JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import numpy as np

    images = np.random.default_rng(0).normal(size=images_shape).astype(np.float32)
    model = keras.applications.ConvNeXtTiny(
        weights=None, include_preprocessing=False, classifier_activation=None, classes=CLASSES
    )
    if mode == "inference":
        return lambda: model.predict_on_batch(images), {"keras": keras}
    model.compile(
        keras.optimizers.AdamW(1e-4, weight_decay=0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    labels = np.arange(images_shape[0]) % CLASSES
    return lambda: model.train_on_batch(images, labels), {"keras": keras}


def timm_call(compiled, mode, images_shape, overrides):
    """ConvNeXt-T of timm, channels_last."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
    from torchvision_operators import define_missing_operators

    define_missing_operators()
    import timm
    import torch

    batch, height, width, channels = images_shape
    images = torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % CLASSES
    model = timm.create_model(
        "convnext_tiny", num_classes=CLASSES, drop_path_rate=0.1, **overrides
    ).to(memory_format=torch.channels_last)
    network = torch.compile(model) if compiled else model
    if mode == "inference":
        model.eval()

        def call():
            with torch.inference_mode():
                network(images)

    else:
        model.train()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        kept = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05, fused=True)

        def call():
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

    return call, {"timm": timm, "torch": torch}


CONTENDERS = ("convnext_jax", "flax", "keras", "timm-eager", "timm-compiled")


def main():
    """Makes the contender ready and lets it run, a line at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("mode", choices=("inference", "training"))
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--overrides", type=json.loads, default={}, help="of depths and dims")
    arguments = parser.parse_args()
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    name, mode, overrides = arguments.contender, arguments.mode, arguments.overrides
    if name in ("convnext_jax", "flax"):
        call, modules = jax_call(name == "flax", mode, shape, overrides)
    elif name == "keras":
        call, modules = keras_call(mode, shape)
    else:
        call, modules = timm_call(name == "timm-compiled", mode, shape, overrides)
    begun = time.perf_counter()
    call()
    ready = {k: module.__version__ for k, module in modules.items()}
    print(json.dumps({"versions": ready, "first_call": time.perf_counter() - begun}), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        call()
        print(json.dumps(time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    main()
