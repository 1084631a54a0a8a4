"""A hook of MkDocs for links to files outside of docs/, such as ../configs/sweep/README.md.

They work in the repository. The site holds no such file but images, so any other link becomes its text and the path.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]*)(?:#[^)\s]*)?\)")


def on_files(files, config, **_):
    """Add the images outside of docs/ that a page shows. Called by MkDocs."""
    for page in list(files.documentation_pages()):
        for image, _, link in LINK.findall(page.content_string):
            path = outside(page, link)
            if image and path and path not in files.src_uris:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown, page, **_):
    """The text of a page with links out of docs/ replaced. Called by MkDocs."""

    def replaced(link):
        image, text, path = link[1], link[2], outside(page.file, link[3])
        if not path:
            return link[0]
        if image:
            return f"![{text}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri))})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


def outside(file, link):
    """The path from the project's folder of what a link out of docs/ leads to; None where it stays within docs/."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), link))
    return path.removeprefix("../") if path.startswith("../") else None
