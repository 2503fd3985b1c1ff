"""Checksums of a volume of two files include both."""

import hashlib
import os
from pathlib import Path

import pytest

from segkit.errors import DatasetError
from segkit.io.checksums import checksum, checksums, file_states
from tests.io.test_voxel_bytes import HERE, HERE_MHD, RAW, mhd, nhdr


def test_a_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    # From FIPS 180-4's test vectors.
    expected = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert checksum(tmp_path / "empty") == expected


@pytest.mark.parametrize("detached", [True, False])
def test_checksums_list_a_header_and_its_data_file(tmp_path: Path, detached: bool) -> None:
    path = nhdr(tmp_path, RAW, HERE) if detached else mhd(tmp_path, HERE_MHD)
    before, sums = file_states([path]), checksums([path])
    assert [Path(name).name for name, *_ in before] == [path.name, "scan.raw"]
    assert sums == [
        {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in (path, tmp_path / "scan.raw")
    ]
    os.utime(tmp_path / "scan.raw", ns=(1, 1))
    assert file_states([path]) != before
    (tmp_path / "scan.raw").write_bytes(bytes(48))
    assert checksums([path])[0] == sums[0] and checksums([path])[1] != sums[1]


def test_the_error_for_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.nii: cannot be read: No such file"):
        file_states([tmp_path / "gone.nii"])
