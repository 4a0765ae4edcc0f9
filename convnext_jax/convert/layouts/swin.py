"""Files of Swin: the authors', timm's, torchvision's and Hugging Face transformers'.

The authors' program: https://github.com/microsoft/Swin-Transformer. Older versions of
timm had its names; newer ones count a patch merging to the stage behind it, as this library does.
"""

from collections.abc import Mapping
from typing import Any

from convnext_jax.convert.layouts.table import (
    AS_IS,
    CONV,
    LINEAR,
    LINEAR_KERNEL,
    NORM,
    TABLE,
    Kind,
    Layout,
)

_TABLE: Kind = (("", "", TABLE),)
_MERGE: Kind = (("weight", "kernel", LINEAR_KERNEL),)
# transformers keeps the three products of attention apart that are one here.
_QUERY, _KEY, _VALUE = (
    (
        ("weight", "kernel", LINEAR_KERNEL.as_part(i, 3)),
        ("bias", "bias", AS_IS.as_part(i, 3)),
    )
    for i in range(3)
)

_INDEX = "*.relative_position_index"
_FIXES = {"norm_eps": 1e-5}
# A masked pre-training's decoder and token: https://github.com/microsoft/SimMIM.
_BESIDES = ("decoder.*", "mask_token", "*.mask_token")


# fmt: off
def _authors(merging: str, head: str) -> tuple[tuple[str, str, Kind], ...]:
    block, ours = "layers.{i}.blocks.{j}", "stages_{i}/blocks_{j}"
    table = "attn.relative_position_bias_table", "attn/relative_position_bias_table"
    return (
        ("patch_embed.proj",                "stem/conv",                     CONV),
        ("patch_embed.norm",                "stem/norm",                     NORM),
        (f"{block}.norm1",                  f"{ours}/norm1",                 NORM),
        (f"{block}.attn.qkv",               f"{ours}/attn/qkv",              LINEAR),
        (f"{block}.{table[0]}",             f"{ours}/{table[1]}",            _TABLE),
        (f"{block}.attn.proj",              f"{ours}/attn/proj",             LINEAR),
        (f"{block}.norm2",                  f"{ours}/norm2",                 NORM),
        (f"{block}.mlp.fc1",                f"{ours}/mlp/fc1",               LINEAR),
        (f"{block}.mlp.fc2",                f"{ours}/mlp/fc2",               LINEAR),
        ("layers.{i}.downsample.norm",      f"{merging}/norm",               NORM),
        ("layers.{i}.downsample.reduction", f"{merging}/reduction",          _MERGE),
        ("norm",                            "norm",                          NORM),
        (head,                              "head",                          LINEAR),
    )
# fmt: on


OFFICIAL = Layout(
    name="official Swin",
    origin="official",
    modules=_authors("stages_{i+1}/downsample", "head"),
    ignored=_BESIDES,
    derived=(_INDEX, "*.attn_mask"),
    fixes=_FIXES,
)
TIMM = Layout(
    name="timm Swin",
    origin="timm",
    modules=_authors("stages_{i}/downsample", "head.fc"),
    derived=(_INDEX, "*.attn_mask"),
    fixes=_FIXES,
)

# fmt: off
TORCHVISION = Layout(
    name="torchvision Swin",
    origin="torchvision",
    modules=(
        ("features.0.0",                    "stem/conv",                         CONV),
        ("features.0.2",                    "stem/norm",                         NORM),
        ("features.{2i+1}.{j}.norm1",       "stages_{i}/blocks_{j}/norm1",       NORM),
        ("features.{2i+1}.{j}.attn.qkv",    "stages_{i}/blocks_{j}/attn/qkv",    LINEAR),
        ("features.{2i+1}.{j}.attn.relative_position_bias_table",
         "stages_{i}/blocks_{j}/attn/relative_position_bias_table",              _TABLE),
        ("features.{2i+1}.{j}.attn.proj",   "stages_{i}/blocks_{j}/attn/proj",   LINEAR),
        ("features.{2i+1}.{j}.norm2",       "stages_{i}/blocks_{j}/norm2",       NORM),
        ("features.{2i+1}.{j}.mlp.0",       "stages_{i}/blocks_{j}/mlp/fc1",     LINEAR),
        ("features.{2i+1}.{j}.mlp.3",       "stages_{i}/blocks_{j}/mlp/fc2",     LINEAR),
        ("features.{2i}.norm",              "stages_{i}/downsample/norm",        NORM),
        ("features.{2i}.reduction",         "stages_{i}/downsample/reduction",   _MERGE),
        ("norm",                            "norm",                              NORM),
        ("head",                            "head",                              LINEAR),
    ),
    derived=(_INDEX,),
    fixes=_FIXES,
)


def _transformers(
    name: str,
    prefix: str = "",
    attention: tuple[str, ...] = ("self.query", "self.key", "self.value", "output.dense", "self"),
    mlp: tuple[str, str] = ("intermediate.dense", "output.dense"),
    fixes: Mapping[str, Any] = _FIXES,
) -> Layout:
    """The table.

    Args:
      name: of the layout.
      prefix: before all names but the classifier's.
      attention: what queries, keys, values and the output's product are called, and where the
        table of biases lies.
      mlp: what its two products are called.
      fixes: see `Layout`.
    """
    block, ours = "encoder.layers.{i}.blocks.{j}", "stages_{i}/blocks_{j}"
    query, key, value, output, biases = attention
    table = "relative_position_bias_table"
    modules: tuple[tuple[str, str, Kind], ...] = (
        ("embeddings.patch_embeddings.projection",  "stem/conv",                         CONV),
        ("embeddings.norm",                         "stem/norm",                         NORM),
        (f"{block}.layernorm_before",               f"{ours}/norm1",                     NORM),
        (f"{block}.attention.{query}",              f"{ours}/attn/qkv",                  _QUERY),
        (f"{block}.attention.{key}",                f"{ours}/attn/qkv",                  _KEY),
        (f"{block}.attention.{value}",              f"{ours}/attn/qkv",                  _VALUE),
        (f"{block}.attention.{biases}.{table}",     f"{ours}/attn/{table}",              _TABLE),
        (f"{block}.attention.{output}",             f"{ours}/attn/proj",                 LINEAR),
        (f"{block}.layernorm_after",                f"{ours}/norm2",                     NORM),
        (f"{block}.{mlp[0]}",                       f"{ours}/mlp/fc1",                   LINEAR),
        (f"{block}.{mlp[1]}",                       f"{ours}/mlp/fc2",                   LINEAR),
        ("encoder.layers.{i}.downsample.norm",      "stages_{i+1}/downsample/norm",      NORM),
        ("encoder.layers.{i}.downsample.reduction", "stages_{i+1}/downsample/reduction", _MERGE),
        ("layernorm",                               "norm",                              NORM),
    )
    return Layout(
        name=name,
        origin="transformers",
        modules=(
            *((prefix + theirs, path, kind) for theirs, path, kind in modules),
            ("classifier", "head", LINEAR),
        ),
        ignored=_BESIDES,
        derived=(_INDEX,),
        fixes=fixes,
    )
# fmt: on


TRANSFORMERS = _transformers("transformers Swin", "swin.")
TRANSFORMERS_BARE = _transformers(
    "transformers Swin without head", fixes={**_FIXES, "num_classes": 0}
)
# The names that its modules have had since version 5. Its own files keep the old ones.
TRANSFORMERS_5 = _transformers(
    "transformers 5 Swin",
    "swin.",
    ("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias"),
    ("mlp.fc1", "mlp.fc2"),
)
