"""The pages of docs/, their tables, and the modules of docs/hooks, for the tests of the pages."""

import re
import sys
from pathlib import Path

from convnext_jax import config_files, recipes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}

# MkDocs loads its hooks from there.
sys.path.insert(0, str(DOCS / "hooks"))


def rows(page: str, heading: str, header: str) -> list[list[str]]:
    """The cells of a page's table, found by the heading above it and its own first line."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = section.partition(f"\n{header}\n")[2].partition("\n\n")[0]
    assert found, f"no table {header!r} below {heading!r}"
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in found.splitlines()[1:]]
    return [[cell.strip() for cell in row] for row in cells]


def code(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def known_fields() -> set[str]:
    """As the pages write them."""
    return {*config_files.field_names(recipes.base()), "config.model.overrides"}
