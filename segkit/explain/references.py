"""References of the volumes that are explained."""

from collections.abc import Sequence
from pathlib import Path

from segkit.errors import VolumeError, first_few
from segkit.evaluation.pairing import pair_by_name
from segkit.evaluation.references import NamedVolume, called, references_in
from segkit.io.inputs import Input


def find_references(inputs: Sequence[Input], references: Path) -> dict[str, NamedVolume]:
    """The reference of each input that has one, by the input's name.

    Args:
        inputs: the volumes. If some lie among the references, they are not taken for references.
        references: the label file of the only volume, or a folder of labels or a dataset, whose
            files are paired with the inputs as in `pair_with`.

    Raises:
        VolumeError: if no input has a reference, or one has several.
    """
    known = references_in(references)
    if [volume.path for volume in known.volumes] == [references]:
        if len(inputs) > 1:
            raise VolumeError(
                f"{references}: expected a reference for each of {len(inputs)} volumes, but this "
                f"is a single file; give a folder of references"
            )
        return {source.name: known.volumes[0] for source in inputs}
    scans = {file.resolve() for source in inputs for file in source.files}
    labels = [volume for volume in known.volumes if volume.path.resolve() not in scans]
    named = {source.files[0]: source.name for source in inputs}
    pairing = pair_by_name([called(file, name) for file, name in named.items()], labels)
    volumes = {(volume.case, volume.path): volume for volume in labels}
    found = {named[scan]: volumes[case, path] for case, scan, path in pairing.pairs}
    if not found:
        names = first_few([source.name for source in inputs], 3)
        raise VolumeError(
            f"{references}: expected references named like the volumes ({names}), found "
            f"{first_few([volume.case for volume in labels], 3) or 'none'}; rename the files or "
            f"leave out --reference"
        )
    return found
