import pytest

from convnext_jax import comparison_recipes, config_checks, recipes
from convnext_jax.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ema_decay", 2.0),
        ("optim.learning_rate", -1.0),
        ("optim.b1", 1.5),
        ("augment.flip", 3.0),
        ("augment.color_jitter", 2.5),
        ("augment.erasing_prob", -0.1),
        ("data.validation_fraction", 2.0),
        ("mix.mixup_alpha", float("nan")),
        ("optim.momentum", 1.5),
        ("optim.decay_rate", -0.1),
        ("loss.target_threshold", 1.5),
        ("data.eval_image_size", 0),
        ("augment.mean", (0.5, 0.5)),
    ],
)
def test_a_number_out_of_bounds_names_its_field(field, value):
    config = recipes.base()
    config_checks.check_values(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field} is .* it must"):
        config_checks.check_values(config)


def test_the_bounds_are_those_of_fields():
    config = recipes.base()
    for name in config_checks.BOUNDS:
        section, _, key = name.rpartition(".")
        assert key in (config[section] if section else config)


def test_a_procedure_that_does_not_exist():
    with pytest.raises(UserError, match=r"'a4'.*a1, a2 or a3"):
        comparison_recipes.strikes_back("a4", "resnet50")
