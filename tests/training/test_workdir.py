"""A run is held to the config that it was started with."""

import json
import logging

import pytest

from convnext_jax.errors import UserError
from convnext_jax.training.workdir import check_config

CONFIG = {
    "model": {"name": "convnext_tiny", "kwargs": {}},
    "optim": {"learning_rate": 4e-3, "betas": (0.9, 0.999)},
    "log_every": 50,
    "data": {"num_workers": 4, "name": "digits"},
}
IGNORE = ("log_every", "data.num_workers")


def changed(**fields):
    config = json.loads(json.dumps(CONFIG))
    for dotted, value in fields.items():
        *parents, last = dotted.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def check(workdir, config, allow=False, **kwargs):
    return check_config(workdir, config, allow=allow, ignore=IGNORE, **kwargs)


def test_the_first_start_writes_and_the_same_config_goes_on(tmp_path):
    workdir = tmp_path / "runs" / "a"
    assert check(workdir, CONFIG) == []
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert check(workdir, CONFIG) == []
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_another_config_is_refused_with_every_field_named(tmp_path):
    check(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_text()
    other = changed(optim__learning_rate=1e-3, model__kwargs={"drop_path_rate": 0.1}, seed=1)
    del other["data"]["name"]
    with pytest.raises(UserError) as caught:
        check(tmp_path, other, how_to_allow="pass --resume_with_changes")
    first, *fields = str(caught.value).splitlines()
    assert str(tmp_path) in first
    assert "pass --resume_with_changes" in first
    assert sorted(line.strip() for line in fields) == [
        'data.name: "digits" -> (absent)',
        "model.kwargs.drop_path_rate: (absent) -> 0.1",
        "model.kwargs: {} -> (absent)",
        "optim.learning_rate: 0.004 -> 0.001",
        "seed: (absent) -> 1",
    ]
    assert (tmp_path / "config.json").read_text() == before


def test_an_allowed_change_is_logged_and_the_old_files_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="convnext_jax")
    check(tmp_path, CONFIG)
    assert check(tmp_path, changed(seed=1), allow=True) == ["seed: (absent) -> 1"]
    assert check(tmp_path, changed(seed=2), allow=True) == ["seed: 1 -> 2"]
    assert "seed: 1 -> 2" in caplog.text
    read = {p.name: json.loads(p.read_text()).get("seed") for p in tmp_path.iterdir()}
    assert read == {"config.json": 2, "config.1.json": None, "config.2.json": 1}
    assert check(tmp_path, changed(seed=2)) == []


def test_fields_that_do_not_matter_for_resuming(tmp_path):
    check(tmp_path, CONFIG)
    assert check(tmp_path, changed(log_every=1, data__num_workers=0)) == []
    with pytest.raises(UserError) as caught:
        check(tmp_path, changed(log_every=1, data__name="cifar10"))
    assert "log_every" not in str(caught.value)
    # A name that merely begins alike is another field.
    with pytest.raises(UserError, match="log_every_epochs"):
        check(tmp_path, changed(log_every_epochs=1))


def test_a_field_that_the_file_is_older_than_stood_at_its_default(tmp_path):
    check(tmp_path, CONFIG)
    newer = changed(model__norm="batch")
    with pytest.raises(UserError, match=r'model\.norm: \(absent\) -> "batch"'):
        check(tmp_path, newer)
    assert check(tmp_path, newer, defaults={"model": {"norm": "batch"}}) == []
    with pytest.raises(UserError, match=r'model\.norm: "batch" -> "layer"'):
        check(tmp_path, changed(model__norm="layer"), defaults={"model": {"norm": "batch"}})


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        check(tmp_path, CONFIG)
