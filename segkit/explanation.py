"""`segkit explain`: what a model attends to, and what its heads of attention are worth."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkit.errors import VolumeError
from segkit.explain.heads import PositionFigures, head_table, study_heads
from segkit.explain.maps import write_maps
from segkit.explain.reach import HeadReach, watching
from segkit.files import refuse_existing, write_json, write_text
from segkit.inference.predictor import Predictor
from segkit.prediction import Input, read_input
from segkit.volume import SUFFIXES, Volume, read_labels, write_volume

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True)
class Explained:
    """What was written of one volume, and how far each head reached in it, by position."""

    name: str
    written: tuple[Path, ...]
    reach: dict[str, list[HeadReach]]


@dataclass(frozen=True)
class CaseOnDisk:
    """A volume and its reference, read whenever they are looked at."""

    source: Input
    path: Path

    @property
    def name(self) -> str:
        """The volume's."""
        return self.source.name

    @property
    def volume(self) -> Volume:
        """The volume."""
        return read_input(self.source)

    @property
    def reference(self) -> Volume:
        """Its labels."""
        return read_labels(self.path)


def explain_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    folder: Path,
    *,
    overwrite: bool = False,
    track: Track = lambda items, what, count: items,
) -> Iterator[Explained]:
    """Write each volume's labels and maps, and say how far the heads of attention reach.

    `NAME_seg`, the maps of `write_maps`, and in `NAME_maps.json` distance and entropy of each head.
    """
    check_targets(inputs, folder, overwrite=overwrite)
    for source in inputs:
        volume = read_input(source)
        with watching(predictor) as watchers:
            prediction = predictor(
                volume, maps=True, track=lambda slabs, count: track(slabs, "explaining", count)
            )
        reach = {position: watcher.result() for position, watcher in watchers.items()}
        labels = folder / f"{source.name}_seg.nii.gz"
        write_volume(labels, prediction.labels)
        written = write_maps(folder, source.name, prediction.maps, volume, reach=reach)
        yield Explained(source.name, (labels, *written), reach)


def explain_heads(
    predictor: Predictor,
    inputs: Sequence[Input],
    references: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    track: Track = lambda items, what, count: items,
) -> list[PositionFigures]:
    """Study the heads on volumes with references, and write `heads.csv` and `heads.json`."""
    table, whole = folder / "heads.csv", folder / "heads.json"
    refuse_existing([table, whole], overwrite=overwrite)
    if references.is_file() and len(inputs) > 1:
        raise VolumeError(
            f"{references}: one reference cannot be that of {len(inputs)} volumes; name a folder"
        )
    paths = [reference_of(source, references) for source in inputs]
    cases = [CaseOnDisk(source, path) for source, path in zip(inputs, paths, strict=True)]
    figures = study_heads(predictor, cases, track=track)
    rows = head_table(figures)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())
    write_json(
        whole,
        {
            "cases": [case.name for case in cases],
            "positions": [
                {
                    "position": position.position,
                    "answer": position.answer(),
                    "p_value": position.p_value,
                    "dice": position.dice,
                    "dice_without_any": position.dice_without_any,
                    "dice_least_important_masked_first": position.least_first,
                    "dice_most_important_masked_first": position.most_first,
                    "heads": [vars(head) for head in position.heads],
                }
                for position in figures
            ],
        },
    )
    return figures


def check_targets(inputs: Sequence[Input], folder: Path, *, overwrite: bool) -> None:
    """Raise VolumeError where what `explain_files` would write is there already, or is an input."""
    files = {file.resolve() for source in inputs for file in source.files}
    targets = [
        folder / f"{source.name}{ending}"
        for source in inputs
        for ending in ("_seg.nii.gz", "_maps.json")
    ]
    for target in targets:
        if target.resolve() in files:
            raise VolumeError(f"{target}: is an input itself; name another --out")
    maps = [path for source in inputs for path in folder.glob(f"{source.name}_map-*.nii.gz")]
    refuse_existing([*targets, *maps], overwrite=overwrite)


def reference_of(source: Input, references: Path) -> Path:
    """The reference of an input: the file itself, or the one in a folder that has its name."""
    if references.is_file():
        return references
    if not references.is_dir():
        raise VolumeError(f"{references}: no such file or folder; check the path")
    found = [
        path for suffix in SUFFIXES if (path := references / f"{source.name}{suffix}").exists()
    ]
    if not found:
        raise VolumeError(f"{references}: holds no volume called {source.name}")
    return found[0]
