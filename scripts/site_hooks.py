"""What mkdocs needs to know of the pages in docs/, which also have to read well in the repository."""

import re
from pathlib import PurePosixPath
from typing import Any

# the link to the other language, which the site has in its header
SWITCH = re.compile(r"^\[(中文|English)\]\([\w-]+(\.zh)?\.md\)\n+", re.M)
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links between pages lose their language; a link to a file of the repository becomes the file's name."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if target.startswith(("http:", "https:", "#")):
            return found[0]
        if target.startswith("../"):
            name = str(PurePosixPath(target.removeprefix("../")))
            return f"`{name}`" if text.strip("`") in (name, PurePosixPath(name).name) else f"{text} (`{name}`)"
        return f"[{text}]({target.replace('.zh.md', '.md')})"

    return LINK.sub(link, SWITCH.sub("", markdown, count=1))
