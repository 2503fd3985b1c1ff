"""Many `segkit` commands, each in a process of its own that a fault strikes, in a second each.

    with Zygote() as zygote:
        ended = zygote.run(["predict", "scans", "--out", "out"], folder, Fault(kill_at=7))

A process that has imported everything forks once for each command, so that none imports anew. What
strikes is armed in the child:

    kill_at        SIGKILL before the n-th time that a file in the folder is opened for writing,
                   renamed or removed, or a folder is made or removed
    kill_after     the end, as sudden, in the midst of the first file that outgrows so many bytes
    file_limit     no file may outgrow so many bytes; what writes on is refused, as on a full disk
    vanish         (trigger, victim): as soon as the one is opened, the other is gone

Signals may be sent at any time to `Child.pid`. Linux alone.
"""

import atexit
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Fault:
    """What strikes a command, if anything."""

    kill_at: int | None = None
    kill_after: int | None = None
    file_limit: int | None = None
    vanish: tuple[str, str] | None = None
    within: str = ""
    """The folder whose changes are counted, below the one that the command runs in."""


@dataclass(frozen=True)
class Ended:
    """What became of a command."""

    code: int
    """Its exit code; of one that a signal ended, minus its number."""
    out: str
    err: str
    seconds: float
    changes: int
    """How often files were changed, if it came to its end."""
    survivors: tuple[int, ...]
    """Processes that it left behind."""

    @property
    def told(self) -> bool:
        """Whether all that it said of its failure is sentences of ours, one a line."""
        lines = self.err.strip().splitlines()
        return self.code > 0 and bool(lines) and all(line.startswith("segkit: ") for line in lines)


class Child:
    """A command that runs."""

    def __init__(self, zygote: "Zygote", pid: int, place: Path) -> None:
        self.zygote, self.pid, self.place = zygote, pid, place
        self.started = time.monotonic()

    def wait(self) -> Ended:
        """What became of it."""
        told = self.zygote.hear()
        seconds = time.monotonic() - self.started
        counted = self.place / "changes"
        return Ended(
            told["code"],
            (self.place / "out").read_text(),
            (self.place / "err").read_text(),
            seconds,
            int(counted.read_text()) if counted.exists() else 0,
            survivors_of(self.pid),
        )


class Zygote:
    """The process that forks; use it as a context."""

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.places = tempfile.TemporaryDirectory()
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        assert self.hear() == {"ready": True}
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.places.cleanup()

    def hear(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, words: Sequence[object], folder: Path, fault: Fault = Fault()) -> Child:
        """Begin a command in a folder; one at a time."""
        self.count += 1
        place = Path(self.places.name) / str(self.count)
        place.mkdir()
        for name in ("out", "err"):
            # It may be killed before it has opened them.
            (place / name).touch()
        request = {
            "words": [str(word) for word in words],
            "folder": str(folder),
            "place": str(place),
            "fault": asdict(fault),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Child(self, self.hear()["pid"], place)

    def run(self, words: Sequence[object], folder: Path, fault: Fault = Fault()) -> Ended:
        """A command from beginning to end."""
        return self.start(words, folder, fault).wait()


def survivors_of(session: int, patience: float = 10.0) -> tuple[int, ...]:
    """Processes of a session that are still there after so many seconds."""
    end = time.monotonic() + patience
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
        if not found or time.monotonic() > end:
            return tuple(found)
        time.sleep(0.05)


def arm(fault: Fault, place: Path) -> None:
    """Have the fault strike this process, and count its changes."""
    within = str(Path.cwd() / fault.within)
    count = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event != "open" and event not in CHANGES:
            return
        path = details[0]
        if not isinstance(path, str | os.PathLike):
            return
        name = os.path.abspath(path)
        if event == "open" and fault.vanish is not None and name == fault.vanish[0]:
            Path(fault.vanish[1]).unlink(missing_ok=True)
        if not name.startswith(within) or (event == "open" and not details[2] & WRITING):
            return
        count += 1
        if count == fault.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    atexit.register(lambda: (place / "changes").write_text(str(count)))
    limit = fault.kill_after or fault.file_limit
    if limit is not None:
        if fault.kill_after is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def serve() -> None:
    """Fork for each request."""
    # All that a command imports, here once.
    import segkit.cli.main
    import segkit.explain.explain_files
    import segkit.inference.predict_files
    import segkit.inference.predictor
    import segkit.planning.make_plan
    import segkit.system.progress
    import segkit.training.two_stages

    gc.freeze()
    say = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=say, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            break
        print(json.dumps({"pid": pid}), file=say, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=say, flush=True)
    else:
        return
    os.setsid()
    os.chdir(request["folder"])
    place = Path(request["place"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    say.close()
    details = request["fault"]
    arm(Fault(**{**details, "vanish": details["vanish"] and tuple(details["vanish"])}), place)
    sys.argv = ["segkit", *request["words"]]
    code = 1
    try:
        segkit.cli.main.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except Exception:
        traceback.print_exc()
    # As the interpreter ends, but for taking apart all that was imported, page by copied page.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
