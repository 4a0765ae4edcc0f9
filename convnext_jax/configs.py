"""Lists the library's configs, or prints one: python -m convnext_jax.configs [NAME].

So that somebody who installed a package has the files at hand that a checkout shows in configs/.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from convnext_jax import cli
from convnext_jax.config_files import library_configs
from convnext_jax.errors import UserError

_EXAMPLES = """
all of them, a line each
  python -m convnext_jax.configs
a beginning for a config of your own
  python -m convnext_jax.configs tiny > my_config.py
  python -m convnext_jax.train --config my_config.py --workdir runs/mine
"""


def summary(file: Path) -> str:
    """The first paragraph of a config file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` are the arguments after its name."""
    parser = cli.make_parser(
        "configs",
        "List the library's configs, or print one.",
        _EXAMPLES,
        "A name given to --config of another program is looked for as a file first.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one's file")
    arguments: argparse.Namespace = parser.parse_args(argv)
    files = library_configs()
    if arguments.name is None:
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:<{width}}  {summary(file)}")
        return
    name = Path(arguments.name).stem
    if name not in files:
        raise UserError(f"there is no config {arguments.name!r}; there are {', '.join(files)}")
    print(files[name].read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    sys.exit(cli.run(main))
