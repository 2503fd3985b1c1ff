"""Examples of docstrings as Python code: an extension that mkdocstrings loads (mkdocs.yml).

In a docstring, an example is plain text, so that `help()` shows nothing but the code. On a page it
would be a paragraph. Here it becomes a block of code, without the prompts and results of a session.
"""

import re
from typing import Any

import griffe

HEADING = re.compile(r"^( *)Example:\n", flags=re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """Turns the section "Example:" of each docstring into a block of Python."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = with_code(obj.docstring.value)


def with_code(docstring: str) -> str:
    """The docstring with a fence around its example, if it has one."""
    found = HEADING.search(docstring)
    if found is None:
        return docstring
    indent = f"{found[1]}    "
    before, lines = docstring[: found.end()], docstring[found.end() :].split("\n")
    inside = 0
    while inside < len(lines) and (lines[inside].startswith(indent) or not lines[inside].strip()):
        inside += 1
    code = "\n".join(lines[:inside]).rstrip().split("\n")
    fenced = [f"{indent}```python", *_without_prompts(code, indent), f"{indent}```"]
    return before + "\n".join([*fenced, "", *lines[inside:]])


def _without_prompts(code: list[str], indent: str) -> list[str]:
    """Lines of code. If some have the prompt `>>>`, the lines without one are results."""
    prompts = (f"{indent}>>> ", f"{indent}... ")
    if not any(line.startswith(prompts[0]) for line in code):
        return code
    return [
        indent + line.removeprefix(prompts[0]).removeprefix(prompts[1])
        if line.startswith(prompts)
        else f"{indent}# {line.strip()}"
        for line in code
    ]
