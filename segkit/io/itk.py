"""SimpleITK, imported when it is first asked for."""

from typing import Any


def simple_itk() -> Any:
    """The package SimpleITK, imported at its first use."""
    # It takes 0.1 GiB, a third of all imports for a NIfTI file, which does not need it.
    import SimpleITK

    return SimpleITK
