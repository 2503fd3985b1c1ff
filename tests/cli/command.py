"""The command, run in this process."""

import sys

import pytest

from segkit.cli.main import main


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a `segkit` command."""
    before, sys.argv = sys.argv, ["segkit", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    code = stop.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out, err
