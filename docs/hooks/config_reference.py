"""The reference of all config fields and of all configs, as Markdown, from the code itself.

A field's meaning is the comment that `recipes.base()` has beside it; `field_meanings.py` completes
those that are too short for a reader who does not see the code.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from field_meanings import MEANINGS
from ml_collections import ConfigDict

from convnext_jax import config_checks, config_files, recipes
from convnext_jax.models.roadmap_steps import ROADS, STEPS

SECTIONS = {
    "": "The run",
    "model": "model",
    "data": "data",
    "augment": "augment",
    "mix": "mix",
    "loss": "loss",
    "optim": "optim",
    "mesh": "mesh",
}


class Group(NamedTuple):
    """Configs that are read side by side.

    Attributes:
      title: the heading.
      configs: the columns, as they are given to `--config`, without "configs/" and ".py".
      variants: others of these files, told by what sets them apart from the column of the file.
    """

    title: str
    configs: Sequence[str]
    variants: Sequence[str] = ()


_SIZES = ("tiny", "small", "base", "large", "xlarge")
_FIRST, _LAST = STEPS[0].name, STEPS[-1].name
GROUPS = (
    Group(
        "To begin with",
        ("digits", "cifar10", "finetune_folder"),
        ("cifar10:folder", "finetune_folder:convnext_base"),
    ),
    Group("ImageNet-1K from scratch", ("tiny", "small", "base", "large")),
    Group("ImageNet-1K from scratch, isotropic", ("iso_small", "iso_base", "iso_large")),
    Group("ImageNet-22K", tuple(f"{size}_22k" for size in _SIZES)),
    Group(
        "From ImageNet-22K to 1K",
        tuple(f"{size}_22k_ft_1k" for size in _SIZES),
        tuple(f"{size}_22k_ft_1k:384" for size in _SIZES),
    ),
    Group("From 224 to 384 pixels", ("base_384", "large_384")),
    Group("V2 from FCMAE weights, small", ("v2_atto", "v2_femto", "v2_pico", "v2_nano")),
    Group("V2 from FCMAE weights, large", ("v2_tiny", "v2_base", "v2_large", "v2_huge")),
    Group("ResNet-50", ("resnet50", "resnet50_a1", "resnet50_a2", "resnet50_a3")),
    Group("Swin", ("swin_tiny", "swin_small", "swin_base")),
    Group(
        "The road from ResNet to ConvNeXt",
        tuple(f"roadmap:{road}/{step}" for road in ROADS for step in (_FIRST, _LAST)),
    ),
)


def comments() -> dict[str, str]:
    """The comment of each field of `recipes.base()`, by the field's name, "" for none.

    A comment stands behind its field, or on the lines right above it; in `recipes.base()` several
    lines of comment belong to the one field below them.
    """
    source = inspect.getsource(recipes.base)
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            (beside if token.line[: token.start[1]].strip() else alone)[token.start[0]] = text
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        above = []
        line = node.lineno - 1
        while line in alone:
            above.insert(0, alone[line])
            line -= 1
        found[name] = beside.get(node.lineno, "") or " ".join(above)
    fields = {name.removeprefix("config.") for name in config_files.field_names(recipes.base())}
    return {name: text for name, text in found.items() if name in fields | {"model.overrides"}}


def meaning(name: str, comment: str) -> str:
    """What a field's row says of it: the completion, the comment, the bounds."""
    completion = MEANINGS.get(name, "")
    parts = [completion, comment]
    if completion.endswith(":"):
        parts = [f"{completion} {comment}"]
    if bounds := config_checks.BOUNDS.get(name):
        low, high = bounds
        parts.append(
            f"{low:g} or more"
            if high == float("inf")
            else f"In [{low:g},\N{NO-BREAK SPACE}{high:g}]"
        )
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts if part)


def fields() -> str:
    """All fields of `recipes.base()`, a table for each section."""
    base = recipes.base()
    by_section: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name, comment in comments().items():
        section, _, key = name.rpartition(".")
        holder = base[section] if section else base
        free = name in config_checks.FREE_FIELDS or section in config_checks.FREE_FIELDS
        by_section[section].append(
            _row(
                f"`{name}`" + ("\N{NO-BREAK SPACE}↺" if free else ""),
                _default(holder, key),
                meaning(name, comment),
            )
        )
    return "\n\n".join(
        f"### {SECTIONS[section] or section}\n\n"
        + "\n".join([_row("field", "default", "meaning"), "|---|---|---|", *rows])
        for section, rows in by_section.items()
    )


def configs() -> str:
    """All config files by group: what each is, and where it differs from `recipes.base()`."""
    return "\n\n".join(_group(group) for group in GROUPS)


def differences(config: ConfigDict) -> dict[str, Any]:
    """The fields in which a config differs from `recipes.base()`, with its values."""
    return _changed(recipes.base(), config)


def _group(group: Group) -> str:
    changed = {name: differences(config_files.load_config(_path(name))) for name in group.configs}
    rows = dict.fromkeys(name for values in changed.values() for name in values)
    order = {name: place for place, name in enumerate(comments())}
    last = order["model.overrides"]  # whose own entries are no fields of `recipes.base()`
    table = [
        _row("field", *(f"`{_path(name).removeprefix('configs/')}`" for name in group.configs)),
        "|---" * (len(group.configs) + 1) + "|",
        *(
            _row(f"`{name}`", *(_cell(changed[config], name) for config in group.configs))
            for name in sorted(rows, key=lambda name: (order.get(name, last), name))
        ),
    ]
    files = dict.fromkeys(name.partition(":")[0] for name in group.configs)
    described = [*_described(files), *map(_variant, group.variants)]
    return "\n".join([f"### {group.title}", "", *described, "", *table])


def _described(files: Mapping[str, None]) -> Iterator[str]:
    library = config_files.library_configs()
    for name in files:
        docstring = ast.get_docstring(ast.parse(library[name].read_text(encoding="utf-8"))) or ""
        paragraphs = [" ".join(part.split()) for part in docstring.split("\n\n")]
        meant = [part for part in paragraphs if part.startswith("Meant for")]
        yield f"- **`{name}.py`**: {' '.join([paragraphs[0], *meant])}"


def _variant(name: str) -> str:
    file = config_files.load_config(_path(name.partition(":")[0]))
    changed = _changed(file, config_files.load_config(_path(name)))
    values = ", ".join(f"`{field}` is `{_written(value)}`" for field, value in changed.items())
    return f"- **`{_path(name).removeprefix('configs/')}`**: the same, but {values}."


def _changed(old: ConfigDict, new: ConfigDict) -> dict[str, Any]:
    before, after = _flat(old), _flat(new)
    return {
        name: value for name, value in after.items() if name not in before or before[name] != value
    }


def _path(name: str) -> str:
    file, colon, argument = name.partition(":")
    return f"configs/{file}.py{colon}{argument}"


def _flat(config: ConfigDict) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _cell(values: Mapping[str, Any], name: str) -> str:
    return f"`{_written(values[name])}`" if name in values else ""


def _default(holder: ConfigDict, key: str) -> str:
    value = holder[key]
    if value is None:
        return f"`None` ({holder.get_type(key).__name__})"
    return "none" if isinstance(value, ConfigDict) else f"`{_written(value)}`"


def _written(value: object) -> str:
    """A value as Python writes it, with double quotes as in the config files."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
