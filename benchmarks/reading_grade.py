"""Reading grade of the documentation: the years of school that the English of a page asks for.

    pip install 'textstat<0.7.5'          # newer ones first download a dictionary
    python benchmarks/reading_grade.py    # README, CONTRIBUTING and docs
    python benchmarks/reading_grade.py docs/training.md --json OUT.json

The grade is that of Flesch and Kincaid (1975), as the library textstat computes it:
0.39 words / sentences + 11.8 syllables / words - 15.59. textstat is optional: segkit does not
need it, and no extra installs it.

Only prose counts. Code blocks, tables, headings, pictures, comments and HTML are left out. Each
item of a list ends a sentence. Code within a line (`--maps DIR`) counts as the one word "code",
because nobody reads its syllables.
"""

import argparse
import json
import re
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SENTENCE_END = re.compile(r"[.!?]['\")*]*$")


def prose(text: str) -> str:
    """The sentences of a Markdown page, a paragraph or item of a list on each line."""
    lines, left_out = [], False
    for token in MarkdownIt().enable("table").parse(text):
        if token.type in ("heading_open", "th_open", "td_open"):
            left_out = True
        elif token.type in ("heading_close", "th_close", "td_close"):
            left_out = False
        elif token.type == "inline" and not left_out:
            line = " ".join(_words(token).split())
            if line:
                lines.append(line if SENTENCE_END.search(line) else f"{line.rstrip(':')}.")
    return "\n".join(lines)


def _words(paragraph: Token) -> str:
    """The text that a reader sees of a paragraph, with `code` for code."""
    parts = {"code_inline": "code", "softbreak": " ", "hardbreak": " "}
    shown = (
        token.content if token.type == "text" else parts.get(token.type, "")
        for token in paragraph.children or ()
    )
    return "".join(shown)


def grade(text: str) -> float:
    """Flesch-Kincaid grade of some sentences."""
    import textstat

    return float(textstat.textstat.flesch_kincaid_grade(text))


def main() -> None:
    """Print a row for each page, and one for all prose together."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write the grades here")
    arguments = parser.parse_args()
    texts = {page.name: prose(page.read_text(encoding="utf-8")) for page in arguments.pages}
    texts = {name: text for name, text in texts.items() if text}
    texts["all"] = "\n".join(texts.values())
    grades = {name: round(grade(text), 1) for name, text in texts.items()}
    print("| page | words | grade |", "|---|---:|---:|", sep="\n")
    for name, value in grades.items():
        print(f"| {name} | {len(texts[name].split())} | {value:.1f} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(grades, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
