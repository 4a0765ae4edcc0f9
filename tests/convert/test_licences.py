"""What a conversion says of the terms under which weights were published."""

import jax
import jax.numpy as jnp
import pytest
from foreign_files import written

from convnext_jax.convert import __main__ as convert
from convnext_jax.convert.detection import detect
from convnext_jax.convert.licences import licence
from convnext_jax.convert.mapping import from_params
from convnext_jax.convert.stored import CheckpointWeights, find_weights
from convnext_jax.models import ConvNeXt

V1 = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "num_classes": 3}
V2 = {**V1, "use_grn": True, "layer_scale_init": None}


def detected(arguments, layout):

    model = ConvNeXt(**arguments)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return detect(from_params(params, model, layout), {"group": None})


@pytest.mark.parametrize(
    ("arguments", "layout", "config", "said"),
    [
        (V1, "official", None, "MIT if these are the authors' weights"),
        (V1, "transformers", {}, "MIT if"),
        (V2, "official", None, "CC-BY-NC-4.0 (not for commercial use) if"),
        (V1, "timm", None, "not told by the file"),
        (V1, "timm", {"pretrained_cfg": {"license": "apache-2.0"}}, "apache-2.0, as the config"),
        (V2, "official", {"license": "mit"}, "mit, as the config"),
        (V1, "torchvision", {"pretrained_cfg": "tagged", "license": 3}, "not told by the file"),
    ],
)
def test_what_is_said(arguments, layout, config, said):
    found = licence({"config": config}, detected(arguments, layout))
    assert found.startswith(said)


def test_it_is_printed_and_stays_with_the_conversion(tmp_path, capsys):
    source = written(tmp_path, "timm Swin")
    convert.main([str(source), str(tmp_path / "swin")])
    assert "licence     not told by the file: that of whoever" in capsys.readouterr().out
    stored = find_weights(tmp_path / "swin")
    assert isinstance(stored, CheckpointWeights)
    assert stored.provenance.licence.startswith("not told by the file")
