"""Volumes broken at random, each either accepted or refused in one sentence: `fuzz(10_000, 0)`.

    python -m benchmarks.faults.fuzz --count 10000

Small valid files of every format are mutated, header and body, inside their compression and out of
it, and each is read in a process of limited memory, which has limited time for each. What is
accepted must lie on the grid that its header gives alone, and be the same once written and read
again. Input number n of a seed is the same on every machine.
"""

import argparse
import gzip
import os
import random
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.testing import assert_array_equal

from segkit.errors import SegkitError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, read_grid, read_labels, read_volume, write_volume
from segkit.io.volume_names import NOT_PICTURES, result_suffix

ROOT = Path(__file__).parents[2]
OUTCOMES = ("accepted", "refused", "raised", "died", "hung", "out of memory")
"""The first two are as they should be; any other is a fault of ours."""
FORMATS = NOT_PICTURES
TEXT_FORMATS = FORMATS[2:]
"""Whose headers are text."""
HEADROOM = 256 * 2**20
"""Bytes that a process may take beyond what it has before it reads anything."""
SECONDS_EACH, SECONDS_TO_START = 10, 120

Mutation = Callable[[random.Random, bytes], bytes]


def fuzz(count: int, seed: int = 0, *, keep: Path | None = None) -> dict[str, int]:
    """How many of `count` mutated files came to each of the OUTCOMES.

    Files that were neither accepted nor refused are kept in the folder `keep`, if one is given.
    """
    tables = fuzz_by_format(count, seed, keep=keep)
    return {outcome: sum(table[outcome] for table in tables.values()) for outcome in OUTCOMES}


def fuzz_by_format(
    count: int, seed: int = 0, *, keep: Path | None = None
) -> dict[str, Counter[str]]:
    """What `fuzz` returns, for each of the FORMATS."""
    tables: dict[str, Counter[str]] = {format: Counter() for format in FORMATS}
    seeds = valid_files()
    done = 0
    while done < count:
        for outcome in _outcomes(seed, done, count):
            number, done = done, done + 1
            name, content = mutated(seeds, seed, number)
            tables["".join(Path(name).suffixes)][outcome] += 1
            if keep is not None and outcome not in OUTCOMES[:2]:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{outcome.replace(' ', '_')}-{seed}-{number}-{name}").write_bytes(content)
    return tables


def _outcomes(seed: int, first: int, count: int) -> list[str]:
    """What came of the files from `first` on, up to the one that ended a process, if one did."""
    words = [sys.executable, "-m", "benchmarks.faults.fuzz", "--child"]
    words += ["--seed", str(seed), "--first", str(first), "--count", str(count)]
    return watched(words, count - first)


def watched(words: list[str], count: int) -> list[str]:
    """What a process says in so many lines, and what ended it where it said fewer."""
    outcomes: list[str] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout is not None
        unread, seconds = b"", float(SECONDS_TO_START)
        while True:
            ready, _, _ = select.select([child.stdout], [], [], seconds)
            if not ready:
                os.kill(child.pid, signal.SIGKILL)
                return [*outcomes, "hung"]
            told = os.read(child.stdout.fileno(), 2**16)
            if not told:
                break
            *lines, unread = (unread + told).split(b"\n")
            outcomes += [line.decode() for line in lines]
            seconds = SECONDS_EACH
    if child.returncode > 0:
        raise RuntimeError(f"the process that reads files ended with {child.returncode}; see above")
    return outcomes if len(outcomes) == count else [*outcomes, "died"]


def read_each(seed: int, first: int, count: int) -> None:
    """Read mutated files in this process, whose memory is limited, and print what came of each."""
    seeds = valid_files()
    warnings.simplefilter("error")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in data_files(seeds).items():
            (Path(folder) / name).write_bytes(content)
        for number in range(first, count):
            name, content = mutated(seeds, seed, number)
            path = Path(folder) / name
            path.write_bytes(content)
            print(outcome_of(path), flush=True)


def outcome_of(path: Path) -> str:
    """What reading a file comes to; a traceback on stderr for what is our own fault."""
    try:
        volume = read_volume(path)
        assert read_grid(path).agrees_with(volume.grid, tolerance=0), (
            "the header gives another grid"
        )
        # Only here may a valid file be turned away: as an image that is no label.
        try:
            read_labels(path)
        except SegkitError as refusal:
            assert "labels" in str(refusal), refusal
        again = path.with_name(f"again{result_suffix(path)}")
        write_volume(again, volume)
        assert_array_equal(read_volume(again).data, volume.data)
        assert read_grid(again).agrees_with(volume.grid, tolerance=_rounding(volume.grid))
    except SegkitError as refusal:
        if "does not fit into memory" in str(refusal):
            return "out of memory"
        if str(refusal).startswith(f"{path}: ") and "\n" not in str(refusal):
            return "refused"
        traceback.print_exc()
        return "raised"
    except MemoryError:
        return "out of memory"
    except Exception:
        traceback.print_exc()
        return "raised"
    return "accepted"


def _rounding(grid: Grid) -> float:
    """In mm, how far a corner may move by float32's rounding of the affine."""
    corner = np.abs(grid.affine[:3]) @ np.array([*grid.shape, 1.0])
    return float(corner.max()) * 1e-6


def valid_files() -> dict[str, bytes]:
    """Small valid files of every format, by name."""
    random_numbers = np.random.default_rng(0)
    affine = np.array([[-1.5, 0.1, 0, 20], [0, 1.4, 0.2, -30], [0.1, 0, 2, 10], [0, 0, 0, 1.0]])
    images = {
        "three": random_numbers.integers(0, 9, (5, 4, 3)).astype(np.int16),
        "four": random_numbers.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "two": random_numbers.integers(0, 3, (6, 7)).astype(np.uint8),
    }
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:

        def keep(name: str) -> None:
            files[name] = (Path(folder) / name).read_bytes()

        for shape, values in images.items():
            for end in (".nrrd", ".mha"):
                grid = Grid((*values.shape, 1)[:3], affine)
                volume = Volume(values.reshape((*grid.shape, *values.shape[3:])), grid)
                write_volume(Path(folder) / f"{shape}.{end[1:]}", volume)
                keep(f"{shape}.{end[1:]}")
        for name, shape, kind, order, codes, slope in (
            ("plain.nii", "three", nib.Nifti1Image, "<", (1, 1), None),
            ("big.nii", "three", nib.Nifti1Image, ">", (1, 1), None),
            ("second.nii", "four", nib.Nifti2Image, "<", (0, 2), None),
            ("slice.nii", "two", nib.Nifti1Image, "<", (1, 0), None),
            ("scaled.nii", "three", nib.Nifti1Image, "<", (2, 0), 0.5),
            ("placeless.nii", "three", nib.Nifti1Image, "<", (0, 0), None),
            ("plain.nii.gz", "three", nib.Nifti1Image, "<", (1, 1), None),
            ("channels.nii.gz", "four", nib.Nifti1Image, ">", (1, 1), None),
            ("second.nii.gz", "three", nib.Nifti2Image, "<", (2, 2), 3.0),
        ):
            header = kind.header_class(endianness=order)
            header.set_data_dtype(images[shape].dtype)
            header.set_xyzt_units("mm")
            image = kind(images[shape], affine, header)
            image.set_sform(affine, codes[1])
            image.set_qform(affine, codes[0])
            if slope is not None:
                image.header.set_slope_inter(slope, 1.0)
            nib.save(image, Path(folder) / name)
            keep(name)
    for name in ("three", "four"):
        packed, raw = f"{name}.gz".encode(), f"{name}.raw".encode()
        head, _, body = files[f"{name}.nrrd"].partition(b"\n\n")
        files[f"{name}.nhdr"] = head + b"\nline skip: 1\ndata file: " + packed
        head = head.replace(b"encoding: gzip", b"encoding: raw")
        files[f"raw_{name}.nrrd"] = head + b"\n\n" + gzip.decompress(body)
        skipped = b"\nline skip: 1\nbyte skip: 7\ndata file: "
        files[f"raw_{name}.nhdr"] = head + skipped + raw
        head, mark, body = files[f"{name}.mha"].partition(b"ElementDataFile = LOCAL\n")
        head = re.sub(rb"CompressedDataSize.*\n", b"", head)
        files[f"{name}.mhd"] = head + b"HeaderSize = 5\nElementDataFile = " + packed
        head = head.replace(b"CompressedData = True", b"CompressedData = False")
        files[f"raw_{name}.mha"] = head + mark + zlib.decompress(body)
        files[f"raw_{name}.mhd"] = head + b"HeaderSize = 12\nElementDataFile = " + raw
    return files


def data_files(seeds: dict[str, bytes]) -> dict[str, bytes]:
    """The data files, by name, of those valid files that are headers alone."""
    found = {}
    for name in ("three", "four"):
        body = seeds[f"{name}.nrrd"].partition(b"\n\n")[2]
        found[f"{name}.gz"] = b"line\n" + body
        found[f"{name}.raw"] = b"line\nskipped" + gzip.decompress(body)
    return found


def mutated(seeds: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """A file's name and content: one of the valid ones, changed in one to four places."""
    drawn = random.Random(f"{seed} {number}")
    name = drawn.choice(sorted(seeds))
    content = seeds[name]
    inside = name.endswith(".gz") and drawn.random() < 0.7
    if inside:
        content = gzip.decompress(content)
    for _ in range(drawn.randint(1, 4)):
        mutation = drawn.choice(TEXT if name.endswith(TEXT_FORMATS) else BINARY)
        content = mutation(drawn, content)
    if inside:
        content = gzip.compress(content, mtime=0)
    if drawn.random() < 0.02:
        name = Path(name).name.split(".")[0] + drawn.choice(FORMATS)
    return name, content


def _place(drawn: random.Random, content: bytes) -> int:
    """A byte's number: as often in the first few hundred, where headers are, as anywhere."""
    return drawn.randrange(max(min(len(content), drawn.choice((360, 2**30))), 1))


def flip(drawn: random.Random, content: bytes) -> bytes:
    """One bit turned over."""
    place = _place(drawn, content)
    changed = bytearray(content)
    changed[place : place + 1] = bytes(c ^ 1 << drawn.randrange(8) for c in content[place:][:1])
    return bytes(changed)


def overwrite(drawn: random.Random, content: bytes) -> bytes:
    """A number of a header replaced by an extreme one."""
    form = drawn.choice("<>") + drawn.choice("hifdq")
    value: float = drawn.choice((0, 1, -1, 2, 7, 32767, -32768))
    if form[1] in "fd":
        value = drawn.choice((0.0, -1.0, 1e-30, 1e30, -1e30, float("nan"), float("inf")))
    elif form[1] in "iq":
        value = drawn.choice((0, -1, 540, 348, 32000, 2**31 - 1, -(2**31)))
    packed = struct.pack(form, value)
    place = _place(drawn, content) // 2 * 2
    return content[:place] + packed + content[place + len(packed) :]


def truncate(drawn: random.Random, content: bytes) -> bytes:
    """The file's end missing, from anywhere or from just behind a header on."""
    return content[: drawn.choice((_place(drawn, content), 348, 352, 540, 544))]


def lengthen(drawn: random.Random, content: bytes) -> bytes:
    """Something after the file's end."""
    return content + drawn.randbytes(drawn.randrange(1, 600))


def cut(drawn: random.Random, content: bytes) -> bytes:
    """A few bytes missing."""
    place = _place(drawn, content)
    return content[:place] + content[place + drawn.randrange(1, 40) :]


def repeat(drawn: random.Random, content: bytes) -> bytes:
    """A few bytes twice."""
    place = _place(drawn, content)
    return content[: place + drawn.randrange(1, 40)] + content[place:]


def number_in_text(drawn: random.Random, content: bytes) -> bytes:
    """A number of a header's text replaced by an extreme one, or by none."""
    found = list(re.finditer(rb"-?\d[\d.e+-]*", content[:600]))
    if not found:
        return content
    one = drawn.choice(found)
    other = drawn.choice(
        (
            b"0",
            b"-1",
            b"nan",
            b"inf",
            b"1e30",
            b"1e-30",
            b"32000",
            b"99999999999",
            b"",
            b"x",
            b"1 1",
        )
    )
    return content[: one.start()] + other + content[one.end() :]


def line_of_text(drawn: random.Random, content: bytes) -> bytes:
    """A line of a header missing, twice, or elsewhere."""
    lines = content.split(b"\n")
    most = min(len(lines), 16)
    line = lines.pop(drawn.randrange(most))
    for _ in range(drawn.randrange(3)):
        lines.insert(drawn.randrange(most), line)
    return b"\n".join(lines)


def word_of_text(drawn: random.Random, content: bytes) -> bytes:
    """A word of a header in the place of another."""
    found = list(re.finditer(rb"[A-Za-z_]+", content[:600]))
    if not found:
        return content
    one, other = drawn.choice(found), drawn.choice(found)
    return content[: one.start()] + other.group() + content[one.end() :]


BINARY: tuple[Mutation, ...] = (
    flip,
    overwrite,
    overwrite,
    overwrite,
    truncate,
    lengthen,
    cut,
    repeat,
)
TEXT: tuple[Mutation, ...] = (
    *(flip, truncate, lengthen, cut, repeat),
    *(number_in_text, number_in_text, line_of_text, word_of_text),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="A folder for what was neither of the two.")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        read_each(settings.seed, settings.first, settings.count)
        return
    tables = fuzz_by_format(settings.count, settings.seed, keep=settings.keep)
    print(f"| format | files | {' | '.join(OUTCOMES)} |")
    print(f"|---|---|{'---|' * len(OUTCOMES)}")
    for format, table in [*tables.items(), ("all", sum(tables.values(), Counter()))]:
        counts = " | ".join(str(table[outcome]) for outcome in OUTCOMES)
        print(f"| {format} | {table.total()} | {counts} |")


if __name__ == "__main__":
    main()
