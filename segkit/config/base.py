"""What every group of settings is made of."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _printable(text: str) -> str:
    if not text.strip():
        raise ValueError(f"found the name {text!r}; give it one that can be read")
    if not text.isprintable():
        raise ValueError(f"{text!r} holds characters that cannot be shown; choose another name")
    return text


Name = Annotated[str, AfterValidator(_printable)]
"""Of a class or channel: it is shown on terminals, which obey what they cannot show."""
Positive = Annotated[int, Field(gt=0)]
Width = Annotated[int, Field(gt=0, le=2**16)]
"""Of a layer. Beyond this, as beyond the others' limits, a number is a mistake or an attack."""
Few = Annotated[int, Field(gt=0, le=64)]
"""Of strides, kernels and what stands side by side."""
Share = Annotated[float, Field(ge=0, le=1)]
Millimetres = Annotated[float, Field(gt=0, le=1e3)]


class Section(BaseModel):
    """A group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def kind_alone(value: Any) -> Any:
    """`skip: additive_grid` means `skip: {kind: additive_grid}`."""
    return {"kind": value} if isinstance(value, str) else value
