"""Patterns of files: `**/` is any folders, `*` any text without a slash, `?` one character."""

import re

WILDCARD = re.compile(r"\*\*/|\*|\?")
MATCHES = {"**/": "(?:.*/)?", "*": "([^/]*)", "?": "([^/])"}


def expression_of(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; its groups are the texts that the wildcards match."""
    parts, end = [], 0
    for wildcard in WILDCARD.finditer(pattern):
        parts += [re.escape(pattern[end : wildcard.start()]), MATCHES[wildcard[0]]]
        end = wildcard.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]))


def case_name(match: re.Match[str]) -> str:
    """The name of the case of a file that matches a pattern; equal texts are taken once.

    sub-*/ses-*/sub-*_T1w.nii.gz  on  sub-01/ses-b/sub-01_T1w.nii.gz  ──▶  "01_b"
    """
    return "_".join(dict.fromkeys(match.groups()))
