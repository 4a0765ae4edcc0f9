"""Links that lead out of docs/, made to lead to pages of the site.

In the repository a page links to a file by its relative path, which a code host follows as well.
Some of these files are pages of the site, too, at another place.
"""

import posixpath
import re
from collections.abc import Mapping

# Files outside docs/ that are pages of the site, by their paths in the repository.
PAGES = {"benchmarks/README.md": "benchmarks.md"}

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")


def relink(markdown: str, path: str, pages: Mapping[str, str] = PAGES) -> str:
    """Rewrites the links of one page.

    Args:
      markdown: the page's text.
      path: of its file, from the root of the repository.
      pages: for files outside docs/, where they lie in the site.

    Returns:
      The text with links as they have to be in the site. What is no page of it is left as it is,
      for the strict build to refuse.
    """

    def in_site(file: str) -> str | None:
        return pages.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)

    here = in_site(path)
    if here is None:
        raise ValueError(f"{path} is no page of the site")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        there = in_site(target)
        if there is None or (path.startswith("docs/") and target.startswith("docs/")):
            return link[1]
        return posixpath.relpath(there, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)
