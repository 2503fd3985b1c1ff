"""The base class of all groups of settings, and types that several of them share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _printable(text: str) -> str:
    if not text.strip():
        raise ValueError(f"a name must have a visible character, found {text!r}; give another name")
    if not text.isprintable():
        raise ValueError(
            f"a name must have only printable characters, found {text!r}; give another name"
        )
    return text


Name = Annotated[str, AfterValidator(_printable)]
"""Name of a class or channel. Only printable characters: a terminal would execute others."""
Positive = Annotated[int, Field(gt=0)]
Width = Annotated[int, Field(gt=0, le=2**16)]
"""Width of a layer. A number above such a limit is a mistake or an attack."""
Few = Annotated[int, Field(gt=0, le=64)]
"""A small number: a stride, a kernel size, or a count of parallel parts."""
Share = Annotated[float, Field(ge=0, le=1)]
Millimetres = Annotated[float, Field(gt=0, le=1e3)]


class Section(BaseModel):
    """The base class of a group of settings. It refuses unknown names and cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def section_of_kind(value: Any) -> Any:
    """A section from the name of its kind: `skip: additive_grid` means `{kind: additive_grid}`."""
    return {"kind": value} if isinstance(value, str) else value
