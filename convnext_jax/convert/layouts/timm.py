"""timm's files, and those of CLIP models whose image tower is timm's ConvNeXt."""

from typing import Any

from convnext_jax.convert.layouts.table import (
    AS_IS,
    CONV,
    CONV1X1,
    LINEAR,
    NORM,
    VECTOR,
    Kind,
    Layout,
)

_GRN: Kind = (("weight", "gamma", AS_IS), ("bias", "beta", AS_IS))


# fmt: off
def _table(norm: str = "head.norm", fc: Kind = LINEAR) -> tuple[tuple[str, str, Kind], ...]:
    """The table.

    Args:
      norm: name of the final norm; with `head_norm_first` it is `norm_pre`.
      fc: kind of the blocks' products; with timm's `conv_mlp` they are 1×1 convolutions.
    """
    return (
        ("stem.0",                         "stem/conv",                      CONV),
        ("stem.1",                         "stem/norm",                      NORM),
        ("stages.{i}.downsample.0",        "stages_{i}/downsample/norm",     NORM),
        ("stages.{i}.downsample.1",        "stages_{i}/downsample/conv",     CONV),
        ("stages.{i}.blocks.{j}.conv_dw",  "stages_{i}/blocks_{j}/dwconv",   CONV),
        ("stages.{i}.blocks.{j}.norm",     "stages_{i}/blocks_{j}/norm",     NORM),
        ("stages.{i}.blocks.{j}.mlp.fc1",  "stages_{i}/blocks_{j}/pwconv1",  fc),
        ("stages.{i}.blocks.{j}.mlp.grn",  "stages_{i}/blocks_{j}/grn",      _GRN),
        ("stages.{i}.blocks.{j}.mlp.fc2",  "stages_{i}/blocks_{j}/pwconv2",  fc),
        ("stages.{i}.blocks.{j}.gamma",    "stages_{i}/blocks_{j}/gamma",    VECTOR),
        (norm,                             "norm",                           NORM),
        ("head.pre_logits.fc",             "pre_logits",                     LINEAR),
        ("head.fc",                        "head",                           LINEAR),
    )
# fmt: on


_NORM_LAST, _NORM_FIRST = {"head_norm_first": False}, {"head_norm_first": True}
_FIXES = {"isotropic": False, "feature_norms": False}
_NO_HIDDEN = {**_FIXES, "head_hidden": None}
_HNF, _HNF_CONV = _table("norm_pre"), _table("norm_pre", CONV1X1)


def _layout(name: str, modules: Any, implies: Any, fixes: Any) -> Layout:
    return Layout(name, "timm", modules, implies=implies, fixes=fixes, stages=4)


TIMM = _layout("timm", _table(), _NORM_LAST, _FIXES)
TIMM_CONV_MLP = _layout("timm conv_mlp", _table(fc=CONV1X1), _NORM_LAST, _FIXES)
TIMM_HNF = _layout("timm hnf", _HNF, _NORM_FIRST, _NO_HIDDEN)
TIMM_HNF_CONV_MLP = _layout("timm hnf conv_mlp", _HNF_CONV, _NORM_FIRST, _NO_HIDDEN)

# Of open_clip's file only the trunk is a ConvNeXt; what lies beside it is the projection to the
# common space and the text tower.
CLIP = Layout(
    name="CLIP",
    origin="clip",
    modules=tuple((f"visual.trunk.{theirs}", ours, kind) for theirs, ours, kind in TIMM.modules),
    ignored=(
        "visual.head.*",
        "logit_scale",
        "logit_bias",
        "text.*",
        "transformer.*",
        "token_embedding.*",
        "positional_embedding",
        "ln_final.*",
        "text_projection*",
        "attn_mask",
    ),
    implies=_NORM_LAST,
)
