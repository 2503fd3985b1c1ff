"""SimpleITK, imported when it is first asked for."""

from typing import Any


def simple_itk() -> Any:
    """The package SimpleITK."""
    # Imported where it is called for: it takes 0.1 GiB, a third of all that segkit imports to
    # segment a NIfTI file, which needs none of it.
    import SimpleITK

    return SimpleITK
