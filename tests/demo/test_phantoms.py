"""Phantoms are what they say: one piece, two parts, no tissue told by its intensity alone."""

from pathlib import Path

import numpy as np
from scipy.ndimage import label as components

from segkit.data.dataset import read_case, read_dataset
from segkit.demo.phantoms import SHAPE, write_hippocampi
from segkit.io.volume import read_labels


def test_a_phantom_is_one_piece_of_two_parts_the_first_in_front(tmp_path: Path) -> None:
    write_hippocampi(tmp_path, 4)
    dataset = read_dataset(tmp_path)
    assert dataset.labelling.numbers == {"background": 0, "anterior": 1, "posterior": 2}
    for case in dataset.cases:
        scan, label = read_case(case, dataset)
        assert scan.data.shape == (*SHAPE, 1) and scan.grid.agrees_with(label.grid, tolerance=1e-3)
        assert scan.data.min() == 0
        pieces, count = components(label.data > 0)
        largest = np.bincount(pieces.ravel())[1:].max()
        assert count == 1 or largest > 0.97 * (label.data > 0).sum()
        world = label.grid.centres()
        front, back = (world[label.data == part].mean(axis=0)[1] for part in (1, 2))
        assert front > back + 10
        # Some two to four millilitres, as a hippocampus has.
        millilitres = (label.data > 0).sum() * np.prod(label.grid.spacing) / 1000
        assert 2 < millilitres < 4.5


def test_intensity_alone_does_not_find_the_structure(tmp_path: Path) -> None:
    """As much of the rest of the scan is as grey as it."""
    write_hippocampi(str(tmp_path), 2)
    dataset = read_dataset(tmp_path)
    for case in dataset.cases:
        scan, label = read_case(case, dataset)
        image, inside = scan.data[..., 0], label.data > 0
        low, high = np.percentile(image[inside], [10, 90])
        alike = (image >= low) & (image <= high) & ~inside
        assert alike.sum() > inside.sum()


def test_phantoms_of_a_seed_are_the_same_and_of_another_are_not(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_hippocampi(tmp_path / folder, 2, seed=seed)
    first, again, other = (
        read_labels(tmp_path / folder / "labelsTr" / "hippocampus_001.nii.gz").data
        for folder in "abc"
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(
        first, read_labels(tmp_path / "a" / "labelsTr" / "hippocampus_000.nii.gz").data
    )
