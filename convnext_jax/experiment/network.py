"""The network of a config."""

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convnext_jax.errors import UserError
from convnext_jax.experiment.images import eval_image_size
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import Network, create_model
from convnext_jax.models.roadmap import ModernizedResNet

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_model(config: ConfigDict, num_classes: int, devices: int) -> Network:
    """The model of a config.

    Args:
      config: its part `model` is read.
      num_classes: the data set's; `config.model.num_classes` goes before it.
      devices: among which a batch is cut, for batch norms that are each device's own.

    Raises:
      UserError: for an unknown name, dtype or argument.
    """
    fields = config.model
    if fields.num_classes is not None and fields.num_classes < num_classes:
        raise UserError(
            f"config.model.num_classes = {fields.num_classes}, but the data set has {num_classes} "
            "classes; give at least that many, or None for just these"
        )
    if fields.dtype not in _DTYPES:
        raise UserError(
            f"config.model.dtype is {fields.dtype!r}; it must be one of {', '.join(_DTYPES)}"
        )
    arguments = fields.overrides.to_dict()
    if fields.scan_blocks:
        arguments["scan_blocks"] = True  # which only some networks know
    try:
        model = create_model(
            fields.name,
            num_classes=num_classes if fields.num_classes is None else fields.num_classes,
            drop_path_rate=fields.drop_path_rate,
            head_init_scale=fields.head_init_scale,
            dtype=_DTYPES[fields.dtype],
            remat=fields.remat,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    if isinstance(fields.remat, str) and not isinstance(model, ConvNeXt):
        raise UserError(
            f"config.model.remat is {fields.remat!r}, but of {fields.name} rematerialisation is "
            "either False or True; only a ConvNeXt has policies"
        )
    sizes = {"image_size": config.data.image_size, "eval_image_size": eval_image_size(config)}
    for field, size in sizes.items():
        if size < model.strides[-1]:
            raise UserError(
                f"config.data.{field} = {size}, but the stride of this model is "
                f"{model.strides[-1]}; give at least that, or a smaller "
                "config.model.overrides.stem_stride"
            )
    return _with_batch_norms(config, model, devices)


def _with_batch_norms(config: ConfigDict, model: Network, devices: int) -> Network:
    """The model, its batch norms over the global batch or over each device's part of it."""
    choice = config.model.batch_norm
    if choice not in ("global", "per_device"):
        raise UserError(
            f'config.model.batch_norm is {choice!r}; it must be "global" or "per_device"'
        )
    if not isinstance(model, ModernizedResNet) or model.norm_type != "batch":
        if choice == "per_device":
            raise UserError(
                f'config.model.batch_norm is "per_device", but {config.model.name} has no batch '
                'norm; leave it at "global"'
            )
        return model
    if choice == "per_device":
        model = model.clone(bn_groups=devices)
    micro = config.batch_size // config.optim.accumulation_steps
    if model.bn_groups < 1 or micro % model.bn_groups:
        raise UserError(
            f"config.model.overrides.bn_groups = {model.bn_groups} does not divide the "
            f"{micro} images of a micro-batch; give a divisor, or set config.model.batch_norm"
        )
    images = micro // model.bn_groups
    if images * (config.data.image_size // model.strides[-1]) ** 2 < 2:
        raise UserError(
            f"a batch norm of {config.model.name} would see one value per channel, which has no "
            "variance; give a larger config.batch_size or config.data.image_size"
        )
    return model


def check_kernels(model: Network, mesh: Mesh) -> None:
    """Holds a network's Pallas kernels, where they are required, to devices that have them.

    Args:
      model: any network; one without a choice of kernels passes.
      mesh: the devices that it is to run on.

    Raises:
      UserError: if the devices are no TPUs.
    """
    platform = mesh.devices.flat[0].platform
    for field in ("depthwise", "mlp"):
        if getattr(model, field, None) == "pallas" and platform != "tpu":
            raise UserError(
                f"config.model.overrides.{field} is 'pallas', whose kernels are for TPUs, but the "
                f"devices are of the platform {platform!r}; leave it out, for 'auto'"
            )
