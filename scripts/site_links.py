"""A hook of MkDocs for links to files outside of docs/, such as ../configs/sweep/README.md.

They work in the repository. The site does not hold these files, so there the link becomes its text and the path."""

import posixpath
import re

LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]*)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown, page, **_):
    """The text of a page with links out of docs/ replaced. Called by MkDocs."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(link):
        text, path = link[1], posixpath.normpath(posixpath.join(folder, link[2]))
        if not path.startswith("../"):
            return link[0]
        path = path.removeprefix("../")
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)
