"""Commands that run while Slicer stays alive: polled by a timer, stopped on request.

Slicer holds Python's lock while it waits for events, so threads of Python do not run then. For this
reason nothing here uses threads or pipes: output goes to files, and `poll` reads what is new.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ExtensionError

SECONDS_TO_STOP = 15.0
"""A command that was asked to stop is killed after this time."""
KILLED = -9


class Job:
    """Commands that run one after the other; the first that fails is the last.

    Args:
        steps: the words of each command.
        folder: an empty folder for their output.
        variables: environment variables.
        together: take the standard output as part of the log too, as for pip.

    Raises:
        ExtensionError: the first command cannot be started.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[str]],
        folder: Path,
        variables: Mapping[str, str],
        *,
        together: bool = False,
    ) -> None:
        self.together = together
        self.steps = [list(step) for step in steps]
        self.folder = folder
        self.variables = dict(variables)
        self.number = -1
        """The number of the step that runs, from 0."""
        self.progress: float | None = None
        """The share that is done, from 0 to 1; None while the command does not tell."""
        self.seconds_left: float | None = None
        self.log: list[str] = []
        """The lines that the commands printed, without reports of progress."""
        self.asked_to_stop: float | None = None
        self.code: int | None = None
        """The exit code of the last command; None while a command runs."""
        self._start_next()

    def poll(self) -> bool:
        """Read what is new. Returns whether all has ended; call it a few times a second."""
        if self.code is not None:
            return True
        code = self.process.poll()
        for line in self._new_lines(ended=code is not None):
            self._take(line)
        if code is None:
            self._kill_if_late()
            return False
        self.output.close()
        if code == 0 and self.asked_to_stop is None and self.number + 1 < len(self.steps):
            self._start_next()
            return False
        self.code = code
        return True

    def stop(self) -> None:
        """Ask the command to stop; `poll` then tells when it has, and kills it if it does not."""
        if self.code is None and self.asked_to_stop is None:
            self.asked_to_stop = time.monotonic()
            self._signal(signal.SIGTERM)

    def wait(self, seconds: float = 0.05) -> None:
        """Block until all has ended, as tests and scripts may."""
        while not self.poll():
            time.sleep(seconds)

    @property
    def printed(self) -> str:
        """What the last command printed to its standard output."""
        return self._file("out").read_text("utf-8", "replace")

    def problem(self) -> str | None:
        """One sentence that says why the work failed; None if it did not."""
        if self.code is None or (self.code == 0 and self.asked_to_stop is None):
            return None
        if self.asked_to_stop is not None:
            return "stopped, because you pressed Cancel"
        return sentence_of(self.code, self.printed, self.log)

    def _start_next(self) -> None:
        self.number += 1
        words = self.steps[self.number]
        self.output = self._file("out").open("wb")
        self.place, self.rest = 0, b""
        hidden: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            hidden = {"creationflags": 0x08000000 | 0x00000200}  # no window, and a group of its own
        try:
            with self._file("err").open("wb") as errors:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=errors if self.together else self.output,
                    stderr=errors,
                    env=self.variables,
                    **hidden,
                )
        except OSError as error:
            self.output.close()
            self.code = 1
            raise ExtensionError(
                f"{words[0]} cannot be started: {error.strerror}; choose another command"
            ) from None

    def _file(self, name: str) -> Path:
        return self.folder / f"step-{self.number}.{name}"

    def _new_lines(self, *, ended: bool) -> list[str]:
        with self._file("err").open("rb") as errors:
            errors.seek(self.place)
            new = errors.read()
        self.place += len(new)
        *lines, self.rest = (self.rest + new).replace(b"\r", b"\n").split(b"\n")
        if ended and self.rest:
            lines.append(self.rest)
            self.rest = b""
        return [line.decode("utf-8", "replace").strip() for line in lines if line.strip()]

    def _take(self, line: str) -> None:
        report = _report_in(line)
        if report is None:
            self.log.append(line)
        else:
            self.progress = float(report["progress"])
            left = report.get("seconds_left")
            self.seconds_left = None if left is None else float(left)

    def _kill_if_late(self) -> None:
        asked = self.asked_to_stop
        if asked is not None and time.monotonic() - asked > SECONDS_TO_STOP:
            self._signal(-KILLED)

    def _signal(self, number: int) -> None:
        """Send a signal to the command and to the processes that it started."""
        if os.name == "nt":
            self.process.kill()
        elif self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended between the two lines
                os.killpg(self.process.pid, number)


def _report_in(line: str) -> dict[str, Any] | None:
    """A report of progress as `segkit --progress` writes it; None if the line is another."""
    try:
        report = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return report if isinstance(report, dict) and "progress" in report else None


def sentence_of(code: int, printed: str, log: Sequence[str]) -> str:
    """Why a command failed, in one sentence.

    Args:
        code: its exit code; negative if a signal ended it.
        printed: its standard output, which is JSON with `--json`.
        log: the lines of its standard error.
    """
    if code == KILLED:
        return (
            "the system ended segkit, as it does if memory is full; close other programs, or "
            "segment a smaller volume"
        )
    if any("No such option" in line for line in log):
        return "this segkit is too old for the extension; press Install to get a newer one"
    try:
        told = json.loads(printed)
        failed = [volume["error"] for volume in told.get("volumes", ()) if volume["error"]]
        return str([*failed, told.get("error")][0])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # no JSON: the command ended before it could print any
    said = [line[len("segkit: ") :] for line in log if line.startswith("segkit: ")]
    if said:
        return said[-1]
    last = log[-1] if log else "it printed nothing"
    return f"the command ended with exit code {code}: {last}; the log below says more"
