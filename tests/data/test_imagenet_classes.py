import tensorflow_datasets as tfds

from convnext_jax.data.imagenet_classes import (
    NUM_CLASSES_22K,
    imagenet_class_names,
    imagenet_classes,
    imagenet_wnids,
)


def test_the_order_is_that_of_tfds():
    names = tfds.features.ClassLabel(
        names_file=tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    ).names
    assert imagenet_wnids() == tuple(names)
    assert list(imagenet_wnids()) == sorted(imagenet_wnids())


def test_names_are_those_that_people_know_and_no_two_are_alike():
    names = imagenet_class_names()
    assert len(set(names)) == 1000
    assert (names[0], names[207], names[281], names[999]) == (
        "tench",
        "golden retriever",
        "tabby",
        "toilet tissue",
    )
    assert (names[134], names[517]) == ("crane (bird)", "crane (machine)")
    assert (names[638], names[639]) == ("maillot", "maillot, tank suit")


def test_names_belong_to_their_ids(imagenet_sample):
    names = dict(zip(imagenet_wnids(), imagenet_class_names(), strict=True))
    for file in imagenet_sample:
        wnid, words = file.stem.split("_", 1)
        assert names[wnid].split(",")[0].split(" (")[0] == words.replace("_", " ")


def test_places_in_imagenet_22k():
    places = [c.index_22k for c in imagenet_classes()]
    absent = [c.wnid for c in imagenet_classes() if c.index_22k is None]
    assert absent == ["n04399382"]
    known = [place for place in places if place is not None]
    assert known == sorted(set(known)), "both lists are sorted by wnid"
    assert known[0] >= 0
    assert known[-1] < NUM_CLASSES_22K


def test_subsets():
    a = [i for i, c in enumerate(imagenet_classes()) if "a" in c.subsets]
    r = [i for i, c in enumerate(imagenet_classes()) if "r" in c.subsets]
    assert len(a) == len(r) == 200
    # As the authors' programs number them.
    assert (a[:5], a[-5:]) == ([6, 11, 13, 15, 17], [981, 984, 986, 987, 988])
    assert (r[:5], imagenet_wnids()[r[5]]) == ([1, 2, 4, 6, 8], "n01518878")
    assert len(set(a) & set(r)) == 86
