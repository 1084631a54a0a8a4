"""A page escapes every text that is filled into it, and takes the HTML of its own parts as it is."""

import jinja2
import pytest

from scaling_testbed.report import page

EVIL = "<b>&\"'</b>"


def test_no_text_is_markup_wherever_it_stands(tmp_path):
    sections = [
        (EVIL, page.table([{EVIL: EVIL, "long": EVIL * 9}])),
        ("Claims", page.render("claims", declared="", claims=[(EVIL, "cannot tell", EVIL, EVIL)])),
        ("Folded", page.render("folded", summary=EVIL, content=page.paragraphs([EVIL]))),
        ("Inside", page.render("subsections", sections=[(EVIL, page.paragraphs(["x"])), ("left out", page.table([]))])),
        ("left out", page.table([])),
    ]
    page.write(tmp_path / "deep" / "page.html", EVIL, [EVIL], sections)
    found = (tmp_path / "deep" / "page.html").read_text()
    # title and h1, intro, h2, head and cell of the table, its long cell, three of the claim, two folded, one inside
    assert "<b>" not in found and found.count("&lt;b&gt;&amp;") == 2 + 1 + 1 + 2 + 9 + 3 + 2 + 1
    assert "left out" not in found and '<li class="cannot-tell"><span class="verdict">Cannot tell.</span>' in found
    assert '<td class="long">' in found and found.startswith("<!doctype html>") and "max-width: 70rem" in found


def test_a_value_that_a_template_lacks_is_an_error_and_no_empty_place():
    with pytest.raises(jinja2.UndefinedError):
        page.render("folded", summary="x")
