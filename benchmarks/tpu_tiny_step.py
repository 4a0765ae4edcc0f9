"""The training step that benchmarks compile for a v5e chip, which need not be there."""

import jax
import jax.numpy as jnp

from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.data.augment import AugmentConfig
from convnext_jax.data.mixing import MixConfig
from convnext_jax.models.registry import create_model
from convnext_jax.training import optim, sharding
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.state import abstract_state
from convnext_jax.training.step import jit_train_step, make_train_step

IMAGES, SIZE = 256, 224
# The compiler has no estimate for Pallas kernels.
XLA = {"depthwise": "xla", "mlp": "xla"}
NORMALISED = AugmentConfig()  # and not otherwise augmented
UNMIXED = MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0)


def compiled_step(augment_config=NORMALISED, mix_config=UNMIXED, *, options=XLA, images=IMAGES):
    """Compiles the step of ConvNeXt-T in bfloat16, with AdamW and an average.

    Args:
      augment_config: what becomes of the images.
      mix_config: how they are mixed.
      options: further arguments of the network.
      images: of the batch.

    Returns:
      The program.
    """
    mesh = sharding.create_mesh(1, 1, tpu_topology("v5e:1x1").devices)
    model = create_model(
        "convnext_tiny", num_classes=1000, drop_path_rate=0.1, dtype=jnp.bfloat16, **options
    )
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
        "image": jax.ShapeDtypeStruct((images, SIZE, SIZE, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows),
    }
    return compile_for_tpu(jit_train_step(step, state, mesh), state, batch)
