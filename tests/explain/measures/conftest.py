"""Labels that several modules measure against."""

import numpy as np
import pytest
from numpy import ndarray

from tests.explain.measures.test_measure_maps import SHAPE


@pytest.fixture
def labels() -> ndarray:
    """In RAS+ order: two boxes, neither of whole cells of 2."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 2:7, 3:9] = 1
    labels[5:8, 5:11, 8:15] = 2
    return labels
