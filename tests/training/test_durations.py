import pytest

from convnext_jax.errors import UserError
from convnext_jax.training.durations import to_steps


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("300 epochs", 93600),
        ("1 epoch", 312),
        ("0.5 epochs", 156),
        ("50 steps", 50),
        ("2e6 examples", 488),
        ("1 examples", 1),
        ("0 epochs", 0),
    ],
)
def test_converts_to_steps(duration, steps):
    assert to_steps(duration, steps_per_epoch=312, batch_size=4096, field="total") == steps


@pytest.mark.parametrize("duration", ["300", "epochs", "-1 epochs", "nan steps", "3 weeks", ""])
def test_a_malformed_duration_names_the_field(duration):
    with pytest.raises(UserError, match=r"config\.total is .*300 epochs"):
        to_steps(duration, steps_per_epoch=312, batch_size=4096, field="total")
