"""HTML of the pages: equations as MathML, and line breaks only between the parts of a name.

MkDocs calls `on_page_content` and `on_post_page` (`hooks` in mkdocs.yml). Browsers draw MathML
themselves, so a page with equations needs no script and no font from elsewhere.
"""

import itertools
import re
from html import unescape
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert

MATHML = "http://www.w3.org/1998/Math/MathML"
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""LaTeX as pymdownx.arithmatex leaves it: \\(…\\) inside a sentence, \\[…\\] on its own line."""
SHIFTS = {"msub": ("-0.25em",), "msup": ("0.4em",), "msubsup": ("-0.25em", "0.4em")}
"""How far subscripts and superscripts are moved up."""

CODE = re.compile(r"(<pre.*?</pre>)|(<code[^>]*>)([^<]+)(</code>)", re.DOTALL)
"""Code inside a sentence or a table; a whole block of code is kept as it is."""
BREAK = re.compile(r"(?<=\w\w[_/:=,|])(?=[^\s_/:=,|]{3})|(?<=[a-z]\.)(?=[A-Za-z]{6}|[A-Za-z]+[._])")
"""Where a name may break: after `_`, `/` and the like, and after a point, not before a suffix."""
OPTION = re.compile(r"(?<!\S)-+\w[^\s_/:=,|-]*")
"""The hyphens of an option and its first word, which stay together."""


def on_page_content(html: str, **_: Any) -> str:
    """The page with its equations."""
    return with_equations(html)


def on_post_page(output: str, **_: Any) -> str:
    """The page with places where its code may break. The index of the search does not have them."""
    return with_breaks(output)


def with_equations(page: str) -> str:
    """HTML in which LaTeX is replaced by MathML."""
    return EQUATION.sub(_equation, page)


def _equation(found: re.Match[str]) -> str:
    inline = found[1] == "span"
    math = ElementTree.fromstring(convert(unescape(found[2])))
    _refine(math)
    math.set("display", "inline" if inline else "block")
    ElementTree.register_namespace("", MATHML)
    text = ElementTree.tostring(math, encoding="unicode")
    return text if inline else f'<div class="equation">{text}</div>'


def _refine(element: ElementTree.Element) -> None:
    """Make MathML independent of the fonts of the reader.

    A browser takes the places of subscripts from a font for mathematics. Without such a font they
    would stand on the line, so the places are given here. Names of functions get the space of a
    name, not that of an operator on both sides.
    """
    for child in element:
        _refine(child)
    children = list(element)
    if (shifts := SHIFTS.get(_tag(element))) is not None:
        for child, shift in zip(children[1:], shifts, strict=True):
            element.remove(child)
            if _tag(child) == "mo":
                child.tag = f"{{{MATHML}}}mi"
            moved = ElementTree.SubElement(element, f"{{{MATHML}}}mpadded", voffset=shift)
            ElementTree.SubElement(moved, f"{{{MATHML}}}mstyle", scriptlevel="+1").append(child)
        element.tag = f"{{{MATHML}}}mrow"
    for child in children:
        if _tag(child) == "mo" and re.fullmatch("[a-z]{2,}", child.text or ""):
            child.tag = f"{{{MATHML}}}mi"
    if shifts is None:
        for child, following in itertools.pairwise(children):
            if "mo" not in (_tag(child), _tag(following)) and (
                _is_function(child) or _is_function(following)
            ):
                space = ElementTree.Element(f"{{{MATHML}}}mspace", width="0.17em")
                element.insert(list(element).index(following), space)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.removeprefix(f"{{{MATHML}}}")


def _is_function(element: ElementTree.Element) -> bool:
    """Whether an element is the name of a function, such as norm, and so not a product."""
    return _tag(element) == "mi" and len(element.text or "") > 1


def with_breaks(page: str) -> str:
    """HTML in which code inside sentences breaks after `_`, `/`, `.` and the like.

    `--save_probabilities` becomes `--save_` and `probabilities`: never `--` and `save_…`, as
    browsers break by default, and never a letter at the end of a line.
    """
    return CODE.sub(lambda found: found[1] or found[2] + _broken(found[3]) + found[4], page)


def _broken(code: str) -> str:
    return OPTION.sub(r'<span class="whole">\g<0></span>', BREAK.sub("<wbr>", code))
