"""What MkDocs does besides: generated tables, pages from outside docs/, lists as CommonMark's."""

from pathlib import Path
from typing import Any

import commonmark_lists
import config_reference
import links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_GENERATED = {
    "<!-- generated: fields -->": config_reference.fields,
    "<!-- generated: configs -->": config_reference.configs,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages whose files lie outside docs/."""
    root = Path(config.config_file_path).parent
    for path, uri in links.PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fills in tables, mends links and lists."""
    for marker, make in _GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    outside = {uri: path for path, uri in links.PAGES.items()}
    path = outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return commonmark_lists.widen(links.relink(markdown, path))
