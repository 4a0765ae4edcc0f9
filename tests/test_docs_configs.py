"""The reference of configs that the site shows: generated, and the same as the code."""

import ast
import re
from typing import Any

import pytest
from doc_pages import code, known_fields
from ml_collections import ConfigDict

from convnext_jax import config_files, recipes

import config_reference  # isort: skip  (doc_pages says where the hooks are)
import field_meanings  # isort: skip


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields of a config, by name."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, ConfigDict) else {name: value}
    return values


def test_every_field_has_a_meaning():
    comments = config_reference.comments()
    assert {f"config.{name}" for name in comments} == known_fields()
    unexplained = [name for name, c in comments.items() if not config_reference.meaning(name, c)]
    assert not unexplained, "a comment in recipes.base(), or an entry in docs/hooks"
    assert set(field_meanings.MEANINGS) <= set(comments)


def test_fields_of_the_reference_hold_the_defaults():
    base = flat(recipes.base())
    cells = dict(re.findall(r"^\| `([\w.]+)`[^|]* \| `(.+?)`", config_reference.fields(), re.M))
    assert {name: ast.literal_eval(value) for name, value in cells.items()} == base


def test_comments_are_read_as_they_stand():
    comments = config_reference.comments()
    assert comments["batch_size"] == "global, over all devices"
    assert comments["spike_factor"].startswith("Stop where the loss stays above this")
    assert comments["spike_steps"] == ""
    assert comments["model.batch_norm"].endswith('"global" or "per_device".')


def test_every_config_is_in_one_group():
    names = [name.partition(":")[0] for g in config_reference.GROUPS for name in g.configs]
    names = list(dict.fromkeys(names))
    grouped = [{n.partition(":")[0] for n in g.configs} for g in config_reference.GROUPS]
    assert sum(map(len, grouped)) == len(names)
    assert set(names) == set(config_files.library_configs())


@pytest.fixture(scope="module")
def tables() -> dict[str, list[str]]:
    """The lines below each group's heading."""
    text = f"\n{config_reference.configs()}"
    titles = [group.title for group in config_reference.GROUPS]
    parts = [part.split("\n") for part in text.split("\n### ")[1:]]
    assert [part[0] for part in parts] == titles
    return {title: lines for title, *lines in parts}


@pytest.mark.parametrize("group", config_reference.GROUPS, ids=lambda group: group.title)
def test_a_table_and_the_defaults_make_up_the_config(group, tables):
    header, _, *body = [line for line in tables[group.title] if line.startswith("|")]
    columns = code(header)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body]
    assert len(columns) == len(group.configs)
    for place, column in enumerate(columns, start=1):
        changes = {code(row[0])[0]: code(row[place])[0] for row in cells if row[place]}
        made = flat(recipes.base()) | {k: ast.literal_eval(v) for k, v in changes.items()}
        assert made == flat(config_files.load_config(f"configs/{column}"))
