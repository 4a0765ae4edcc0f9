import numpy as np
import pytest

from convnext_jax.data.class_matching import match_classes
from convnext_jax.data.imagenet_classes import (
    imagenet_class_names,
    imagenet_classes,
    imagenet_wnids,
)
from convnext_jax.errors import UserError

WNIDS = imagenet_wnids()
WORDS = tuple(c.words for c in imagenet_classes())


@pytest.mark.parametrize(
    "model_classes", [None, WNIDS, imagenet_class_names(), WORDS], ids=["none", "ids", "one", "all"]
)
def test_imagenet_by_whichever_of_its_names(model_classes):
    match = match_classes(WNIDS, model_classes, 1000)
    np.testing.assert_array_equal(match.columns, np.arange(1000))
    assert match.names == match.model_names == imagenet_class_names()
    assert match.answers is None
    assert match.note == ""


def test_some_of_imagenets_classes_in_a_folder():
    match = match_classes(("n01443537", "n15075141"), None, 1000)
    assert match.columns.tolist() == [1, 999]
    assert match.names == ("goldfish", "toilet tissue")
    assert match.answers is None
    among = match_classes(("n01443537", "n15075141"), None, 1000, among=frozenset(["n15075141"]))
    assert np.flatnonzero(among.answers).tolist() == [999]


def test_a_model_of_imagenet_22k():
    match = match_classes(WNIDS, None, 21841)
    teddy = WNIDS.index("n04399382")
    assert match.columns[0] == 359
    assert np.flatnonzero(match.columns < 0).tolist() == [teddy]
    assert match.answers.sum() == 999
    assert match.answers[match.columns[match.columns >= 0]].all()
    assert match.model_names[359] == "tench"
    assert "(teddy)" in match.note
    some = match_classes(WNIDS[:2], None, 21841)
    assert some.columns.tolist() == [359, 368]
    assert some.answers.sum() == 999, "a part of ImageNet is no easier"
    assert some.note == ""


def test_other_classes_by_name_in_any_order():
    match = match_classes(("cat", "dog"), ("dog", "eel", "cat"), 3)
    assert match.columns.tolist() == [2, 0]
    assert match.model_names == ("dog", "eel", "cat")


def test_other_classes_by_number():
    match = match_classes(("cat", "dog"), None, 2)
    assert match.columns.tolist() == [0, 1]
    assert "does not name its classes" in match.note


def test_what_does_not_match_is_refused():
    def message(*arguments):
        with pytest.raises(UserError) as caught:
            match_classes(*arguments)
        return str(caught.value)

    told = message(("cat", "dog"), ("cat", "eel"), 2)
    assert "'dog' is not one of the model's 2 (cat, eel)" in told
    assert "1 of its 2 classes" in told
    assert "the model has 10 classes and the data set 2 (cat, dog)" in message(
        ("cat", "dog"), None, 10
    )
    # A thousand other classes are not ImageNet's.
    assert "'n01440764' is not one" in message(WNIDS, tuple(map(str, range(1000))), 1000)
    assert "the model has 21843 classes" in message(WNIDS, None, 21843)
