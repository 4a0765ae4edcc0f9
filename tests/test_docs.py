"""The site of docs/: it leaves nothing out, and quotes messages as the programs print them."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from doc_pages import PAGES, ROOT, code, known_fields, rows

from convnext_jax import __main__ as program
from convnext_jax import config_files

import commonmark_lists  # isort: skip  (doc_pages says where the hooks are)
import links  # isort: skip

# The site


def nav_pages(entry: Any) -> Iterator[str]:
    """The files of a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from nav_pages(value)
    else:
        for value in entry:
            yield from nav_pages(value)


def test_every_page_is_in_the_navigation_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(nav_pages(settings["nav"]))
    assert sorted(listed) == sorted([*PAGES, *links.PAGES.values()])
    assert all((ROOT / path).is_file() for path in links.PAGES)


def test_every_module_is_in_the_reference_or_named_as_left_out():
    package = ROOT / "convnext_jax"
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.stem != "__init__"
    }
    shown = {
        name
        for page, path in PAGES.items()
        if page.startswith("reference/")
        for name in re.findall(r"^::: convnext_jax\.(\S+)$", path.read_text("utf-8"), re.MULTILINE)
    }
    assert shown <= modules
    index = PAGES["reference/index.md"].read_text(encoding="utf-8")
    left_out = rows(f"\n{index}", "What is left out", "| modules | what they are |")
    patterns = [pattern for row in left_out for pattern in code(row[0])]
    for pattern in patterns:
        assert fnmatch.filter(modules - shown, pattern), f"{pattern} leaves out nothing"
    missing = [
        name
        for name in sorted(modules - shown)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    assert not missing, "add them to a page of docs/reference, or to what its index leaves out"


@pytest.mark.parametrize("page", PAGES)
def test_programs_configs_and_fields_of_the_pages_exist(page):
    text = PAGES[page].read_text(encoding="utf-8")
    programs = set(re.findall(r"python -m convnext_jax\.(\w+)", text))
    assert programs <= {*program.PROGRAMS, "PROGRAM"}
    names = set(re.findall(r"\bconfigs/(\w+)\.py", text))
    assert names <= set(config_files.library_configs())
    fields = re.findall(r"(?<![\w.])config\.(\w+(?:\.\w+)*)", text)
    # `config.json` is a file, and what follows `overrides` is an argument of the network.
    fields = [f for f in fields if f not in ("json", "py", "1.json") and "overrides." not in f]
    fields += [f.removesuffix(".overrides") for f in re.findall(r"--config\.(\w+(?:\.\w+)?)", text)]
    known = {name.removeprefix("config.") for name in known_fields()}
    sections = {name.partition(".")[0] for name in known if "." in name}
    assert {*fields} - {"FIELD", "any.field"} <= known | sections


# Messages


def messages() -> str:
    """Every text in the library but docstrings, a line each, `…` in place of what is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        return "…"

    found = []
    for path in (ROOT / "convnext_jax").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        found += [
            " ".join(text(node).split("\n"))
            for node in nodes
            if isinstance(node, ast.JoinedStr)
            or (isinstance(node, ast.Constant) and isinstance(node.value, str))
            if id(node) not in docstrings
        ]
    # What is filled in by `logging` is no part of an f-string.
    return re.sub(r"%(?:s|d|\.\df)", "…", "\n".join(found))


def test_quoted_messages_are_those_of_the_programs():
    page = PAGES["troubleshooting.md"].read_text(encoding="utf-8")
    cells = re.findall(r"^\| (\S.*?) \|", page, re.MULTILINE)
    quoted = [quote for cell in cells for quote in re.findall(r'"(.+?)"(?=,|$)', cell)]
    assert len(quoted) > 50
    known = messages()
    invented = [
        quote
        for quote in quoted
        if not re.search("…".join(map(re.escape, quote.split("…"))).replace("…", ".*?"), known)
    ]
    assert not invented


# What the hooks do to a page's text


def test_links_out_of_docs_lead_to_pages_of_the_site():
    pages = {"benchmarks/README.md": "benchmarks.md"}
    text = (
        "[a](../benchmarks/README.md#a-hosts-core) [b](plan.md#x) [c](https://x.org/a.md) [d](#e)"
    )
    assert links.relink(text, "docs/plan.md", pages) == text.replace(
        "../benchmarks/README.md", "benchmarks.md"
    )
    assert (
        links.relink("[a](../../benchmarks/README.md)", "docs/reference/data.md", pages)
        == "[a](../benchmarks.md)"
    )
    assert links.relink("[a](../docs/plan.md#b)", "benchmarks/README.md", pages) == "[a](plan.md#b)"
    # Left for the strict build to refuse.
    assert links.relink("[a](../tests/x.py)", "docs/plan.md", pages) == "[a](../tests/x.py)"


def test_lists_are_widened_to_four_spaces_a_level():
    text = """\
- one

  ```sh
  for i in 1; do
    - no item
  done
  ```

  more of one
  - inner

    of inner
- two

text
    code
1. first

   of first
"""
    assert (
        commonmark_lists.widen(text)
        == """\
- one

    ```sh
    for i in 1; do
      - no item
    done
    ```

    more of one
    - inner

        of inner
- two

text
    code
1. first

    of first
"""
    )
