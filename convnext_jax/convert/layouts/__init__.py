"""How files of ConvNeXt name their tensors: one table per layout."""

from convnext_jax.convert.layouts import official, timm, torchvision, transformers
from convnext_jax.convert.layouts.table import Layout, Transform

__all__ = ["LAYOUTS", "WAYS_BACK", "Layout", "Transform"]

LAYOUTS: tuple[Layout, ...] = (
    official.OFFICIAL,
    official.ISOTROPIC,
    official.FCMAE_DENSE,
    official.FCMAE_SPARSE,
    timm.TIMM,
    timm.TIMM_CONV_MLP,
    timm.TIMM_HNF,
    timm.TIMM_HNF_CONV_MLP,
    timm.CLIP,
    torchvision.TORCHVISION,
    transformers.V1,
    transformers.V2,
    transformers.BARE,
    transformers.DINOV3,
)

# What can be written, by the name that a user gives. The first that can hold a model is taken.
WAYS_BACK: dict[str, tuple[Layout, ...]] = {
    "official": (official.OFFICIAL, official.ISOTROPIC),
    "timm": (timm.TIMM, timm.TIMM_HNF_CONV_MLP),
    "timm-linear": (timm.TIMM, timm.TIMM_HNF),
    "timm-conv-mlp": (timm.TIMM_CONV_MLP, timm.TIMM_HNF_CONV_MLP),
    "torchvision": (torchvision.TORCHVISION,),
    "transformers": (transformers.BARE, transformers.V1, transformers.V2),
}
