"""Lists as CommonMark has them, for Python-Markdown, which wants four spaces below an item.

The pages are read on code hosts, too, where what belongs to an item begins below its text: two
spaces in for "- ", three for "1. ".
"""

import re

_ITEM = re.compile(r"(?P<indent> *)(?P<bullet>[-*+] |\d+[.)] )\S")
_FENCE = re.compile(r" *(`{3,}|~{3,})")


def widen(markdown: str) -> str:
    """Indents what lies below a list item by four spaces a level.

    Args:
      markdown: a page's text. Code in fences is moved with its item, and else left alone.
    """
    lines = []
    # For each open item where its content begins in the text, outermost first.
    levels: list[int] = []
    fence = ""
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if line.strip() and not fence:
            while levels and indent < levels[-1]:
                levels.pop()
        depth = len(levels)
        taken = min(levels[-1], indent) if levels else 0
        lines.append(" " * 4 * depth + line[taken:] if line.strip() else line)
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif line.strip() == fence:
                fence = ""
        elif not fence and (item := _ITEM.match(line)) and len(item["indent"]) - taken < 4:
            levels.append(len(item["indent"]) + len(item["bullet"]))
    return "\n".join(lines)
