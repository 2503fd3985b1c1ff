"""The base class of all groups of settings, and types that several of them share."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)


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

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        numbers = {name for name in cls.model_fields if not _may_be_true(cls, name)}
        return {
            name: _without_truth(value) if name in numbers else value
            for name, value in tree.items()
        }


class _Truth:
    """True or false in place of another value. Pydantic would read a bool as the number 1 or 0, but
    it refuses this as it refuses any other wrong value."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __repr__(self) -> str:
        return str(self.value).lower()


def _without_truth(value: Any) -> Any:
    """The value, with each bool in it replaced by a value that pydantic refuses."""
    if isinstance(value, bool):
        return _Truth(value)
    if isinstance(value, dict):
        return {key: _without_truth(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_truth(each) for each in value]
    return value


@cache
def _may_be_true(section: type[BaseModel], name: str) -> bool:
    """Whether a setting, or one in a section below it, may be true or false."""
    return _admits_truth(section.model_fields[name].annotation)


def _admits_truth(annotation: Any) -> bool:
    if annotation in (bool, Any):
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_may_be_true(annotation, name) for name in annotation.model_fields)
    return any(_admits_truth(part) for part in get_args(annotation))


def section_of_kind(value: Any) -> Any:
    """A section from the name of its kind: `skip: additive_grid` means `{kind: additive_grid}`."""
    return {"kind": value} if isinstance(value, str) else value
