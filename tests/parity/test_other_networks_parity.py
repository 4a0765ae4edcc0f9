"""Files of ResNet and Swin as their own programs write them, full size, live; and the way back.

With `-s` each case prints a line: the greatest relative error of its logits.
"""

import jax
import numpy as np
import pytest

from convnext_jax.convert.mapping import from_params
from convnext_jax.convert.pretrained import open_pretrained

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

from torchvision_operators import define_missing_operators  # noqa: E402  (it needs PyTorch)

define_missing_operators()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5


def randomised(model, seed=8):
    """Weights that hide nothing: no scale at 1, no bias, table or running average at 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith("attn_mask"):
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("bias_table"):
                tensor.normal_(0.0, 1.0)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, 1.0 / float(np.sqrt(tensor[0].numel())))
            else:
                is_scale = tensor.ndim == 1 and name.endswith("weight")
                tensor.normal_(1.0 if is_scale else 0.0, 0.2)
    return model.eval()


def transformers_swin(**arguments):
    config = transformers.SwinConfig(num_labels=1000, **arguments)
    return transformers.SwinForImageClassification(config)


SMALL = {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
# Case → maker, layout, name in the registry, side of the images.
CASES = {
    "torchvision resnet50": (
        lambda: torchvision.models.resnet50(weights=None),
        "torchvision ResNet",
        "resnet50",
        224,
    ),
    "timm resnet50": (
        lambda: timm.create_model("resnet50"),
        "torchvision ResNet",
        "resnet50",
        224,
    ),
    "torchvision swin_t": (
        lambda: torchvision.models.swin_t(weights=None),
        "torchvision Swin",
        "swin_tiny",
        224,
    ),
    "timm swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        "timm Swin",
        "swin_tiny",
        224,
    ),
    "transformers Swin-T": (transformers_swin, "transformers Swin", "swin_tiny", 224),
    "timm, window 12 at 384": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=384,
            window_size=12,
            embed_dim=32,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 8),
        ),
        "timm Swin",
        None,
        384,
    ),
    "transformers, window 12 at 384": (
        lambda: transformers_swin(image_size=384, window_size=12, **SMALL),
        "transformers Swin",
        None,
        384,
    ),
}


def save(model, path):
    """As its own program does."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(path)
    else:
        torch.save(model.state_dict(), path)


def their_logits(model, x):
    with torch.no_grad():
        output = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    return getattr(output, "logits", output).numpy()


def our_logits(pretrained, x):
    return np.asarray(jax.jit(pretrained.model.apply)(pretrained.variables, x))


def error(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def images(side):
    return np.random.default_rng(side).normal(size=(2, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_its_models_logits_and_goes_back(case, tmp_path):
    make, layout, name, side = CASES[case]
    theirs = randomised(make())
    save(theirs, tmp_path / "weights.pth")
    found = open_pretrained(tmp_path / "weights.pth")
    assert found.model_name == name
    x = images(side)
    expected = their_logits(theirs, x)
    first = error(our_logits(found, x), expected)

    way = "timm" if case.startswith("timm") else layout.partition(" ")[0]
    back = from_params(
        found.variables["params"],
        found.model,
        way,
        batch_stats=found.variables.get("batch_stats"),
    )
    other = make()
    tensors = {key: torch.from_numpy(value.copy()) for key, value in back.items()}
    if hasattr(other, "save_pretrained"):
        transformers_file = tmp_path / "back"
        theirs.save_pretrained(transformers_file)
        from safetensors.torch import save_file

        save_file(tensors, transformers_file / "model.safetensors", {"format": "pt"})
        other, report = type(theirs).from_pretrained(transformers_file, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    else:
        missing, unexpected = other.load_state_dict(tensors, strict=False)
        derived = ("relative_position_index", "num_batches_tracked")
        assert not [key for key in missing if not key.endswith(derived)]
        assert not unexpected
    second = error(their_logits(other.eval(), x), expected)
    print(f"\n{case}: logits {first:.1e}, of the file written back {second:.1e}")
    assert first <= TOLERANCE
    assert second <= 1e-6


@pytest.mark.parametrize("case", ["timm swin_tiny", "transformers Swin-T"])
def test_against_transformers_swin(case, tmp_path):
    """Whatever file it comes from, Swin-T is held against transformers'."""
    make, _, _, side = CASES[case]
    save(randomised(make()), tmp_path / "weights.pth")
    found = open_pretrained(tmp_path / "weights.pth")
    tensors = from_params(found.variables["params"], found.model, "transformers")
    from safetensors.torch import save_file

    reference = transformers_swin()
    reference.save_pretrained(tmp_path / "back")
    file = tmp_path / "back" / "model.safetensors"
    save_file({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, file, {"format": "pt"})
    theirs = transformers.SwinForImageClassification.from_pretrained(tmp_path / "back").eval()
    x = images(side)
    worst = error(our_logits(found, x), their_logits(theirs, x))
    print(f"\n{case} against transformers: logits {worst:.1e}")
    assert worst <= TOLERANCE


def test_the_authors_names_are_those_of_old_timm(tmp_path):
    """timm's own rule from the old names to its new ones, the other way round."""
    from timm.models.swin_transformer import checkpoint_filter_fn

    make, _, _, side = CASES["timm swin_tiny"]
    theirs = randomised(make())
    save(theirs, tmp_path / "timm.pth")
    found = open_pretrained(tmp_path / "timm.pth")
    official = from_params(found.variables["params"], found.model, "official")
    assert "layers.0.downsample.norm.weight" in official
    tensors = {key: torch.from_numpy(value.copy()) for key, value in official.items()}
    other = make()
    other.load_state_dict(checkpoint_filter_fn(tensors, other))
    torch.save({"model": tensors}, tmp_path / "official.pth")
    again = open_pretrained(tmp_path / "official.pth")
    x = images(side)
    expected = their_logits(other.eval(), x)
    errors = error(our_logits(again, x), expected), error(their_logits(theirs, x), expected)
    print(f"\nofficial Swin-T: logits {errors[0]:.1e}, timm reading them {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE
