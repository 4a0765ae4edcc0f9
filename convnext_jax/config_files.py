"""Config files: finding one, running its `get_config`, and setting single fields of it."""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from convnext_jax import config_checks, recipes
from convnext_jax.errors import UserError

_PACKAGE = Path(__file__).parent


def library_configs() -> dict[str, Path]:
    """The library's own config files, by name (`tiny`, without `.py`).

    In an installed package they lie within it; in a checkout beside it, in `configs/`.
    """
    within, beside = _PACKAGE / "library_configs", _PACKAGE.parent / "configs"
    directory = within if within.is_dir() else beside
    return {file.stem: file for file in sorted(directory.glob("*.py"))}


def field_names(config: ConfigDict, prefix: str = "config") -> list[str]:
    """Every field of a config as the command line writes it, `config.optim.learning_rate`."""
    names = []
    for key, value in config.items():
        name = f"{prefix}.{key}"
        names += field_names(value, name) if isinstance(value, ConfigDict) else [name]
    return names


def _get_config(file: Path, argument: str | None) -> ConfigDict:
    # Not by ml_collections' own loader, which needs a method that Python is about to drop.
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file; a config is one, with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} has no function get_config(); begin from another file of its kind")
    _check_argument(module.get_config, file, argument)
    if argument is None:
        config = module.get_config()
    else:
        try:
            config = module.get_config(argument)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"{file} does not take {argument!r} after the colon: {error}"
            ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {file} returned no ConfigDict; begin from recipes.base()")
    return config


def _check_argument(get_config: Callable[..., object], file: Path, argument: str | None) -> None:
    parameters = list(inspect.signature(get_config).parameters.values())
    if argument is not None and not parameters:
        raise UserError(
            f"{file} takes nothing after a colon; leave out :{argument}, and set fields by "
            "--config.FIELD=VALUE"
        )
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if argument is None and needed:
        raise UserError(f"{file} needs its {needed[0]} after a colon, {file}:{needed[0].upper()}")


def _split(path: str) -> tuple[Path, str | None]:
    """The file, and what follows the colon; a drive's colon (`C:...`) is part of the file."""
    match = re.fullmatch(r"(.*?\.py|\w+):(.*)", path, re.DOTALL)
    if match is None or Path(path).is_file():
        return Path(path), None
    return Path(match[1]), match[2]


def _find(file: Path) -> Path:
    """A file as given, or else the library's config of that name."""
    if file.is_file():
        return file
    own = library_configs()
    # What a user without a checkout copies from the documentation, too.
    if file.parent in (Path(), Path("configs")) and file.suffix in ("", ".py") and file.stem in own:
        return own[file.stem]
    there = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
    there += [f"configs/{name}.py" for name in own if f"configs/{name}.py" not in there]
    near = difflib.get_close_matches(str(file), there, n=3, cutoff=0.0)
    raise UserError(f"there is no config file {file}; the nearest are {', '.join(near)}")


def _override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    # absl knows no flag that is either a number or None, so None is taken out beforehand.
    base = recipes.base()
    optional = [name for name in field_names(base) if _value(base, name) is None]
    cleared: dict[str, bool] = {}
    typed = []
    for override in overrides:
        name, _, value = override.lstrip("-").partition("=")
        none = name in optional and value == "None"
        cleared[name] = none
        if not none:
            typed.append(override)
    argv = ["program", *typed]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    rest = values(argv)[1:]
    if rest:
        raise UserError(f"{rest[0]!r} is not understood; fields are set by --config.FIELD=VALUE")
    result: ConfigDict = holder.value
    result.update_from_flattened_dict(
        {name.removeprefix("config."): None for name, none in cleared.items() if none}
    )
    return result


def _with_new_arguments(config: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Sets arguments of the model that the config file does not have; returns the other overrides.

    Their types are the model's affair, so values are read as Python writes them.
    """
    rest = []
    for override in overrides:
        match = re.fullmatch(r"--?config\.model\.overrides\.(\w+)=(.*)", override, re.DOTALL)
        if match is None or match[1] in config.model.overrides:
            rest.append(override)
            continue
        value: object = match[2]
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(match[2])
        with config.unlocked():
            config.model.overrides[match[1]] = value
    return rest


def _with_remat(config: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Sets `config.model.remat`, a bool or a policy's name; returns the other overrides.

    absl knows no flag that is either.
    """
    rest = []
    for override in overrides:
        match = re.fullmatch(r"--?(no)?config\.model\.remat(?:=(.*))?", override, re.DOTALL)
        if match is None or (match[1] and match[2] is not None):
            rest.append(override)
            continue
        value: bool | str = match[1] is None if match[2] is None else match[2]
        with contextlib.suppress(ValueError):
            value = flags.BooleanParser().parse(value)
        config.model.remat = value
    return rest


def _value(config: ConfigDict, name: str) -> object:
    for key in name.split(".")[1:]:
        config = config[key]
    return config


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs a config file's `get_config` and sets single fields.

    Args:
      path: of the Python file, or the name of one of the library's (`tiny`, `tiny.py` or
        `configs/tiny.py`, unless such a file is there); what follows a colon goes to `get_config`
        as its argument.
      overrides: `--config.any.field=value`, as on the command line.

    Returns:
      The config, its fields checked against `recipes.base()`.

    Raises:
      UserError: if there is no such file, no such field, or a value is of another type, or if the
        file does not take what follows the colon, or needs it.
    """
    given, argument = _split(path)
    file = _find(given)
    config = _get_config(file, argument)
    config_checks.check_fields(config)
    overrides = _with_remat(config, _with_new_arguments(config, overrides))
    known = field_names(config)
    for override in overrides:
        match = re.match(r"--?(?:no)?(config\.[\w.]+)", override)
        if override.startswith("-") and (not match or match[1] not in known):
            field = match[1] if match else override
            near = difflib.get_close_matches(field, known, n=3, cutoff=0.0)
            raise UserError(f"{field} is not a field of {file}; the nearest are {', '.join(near)}")
    try:
        config = _override(config, overrides)
    except UserError:
        raise
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"a field's value is of the wrong type: {error}") from error
    config_checks.check_values(config)
    return config
