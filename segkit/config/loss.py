"""Settings of the loss: its terms, and the weights of classes and levels."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from segkit.config.base import Few, Section

TermName = Literal[
    "dice",
    "cross_entropy",
    "focal",
    "top_k",
    "tversky",
    "focal_tversky",
    "generalised_dice",
    "boundary",
    "centre_line",
]
ADDED = ("boundary", "centre_line")
"""Terms that do not train volumes correctly on their own, so that another term is required."""

Weight = Annotated[float, Field(gt=0, le=1e6)]
Mistake = Annotated[float, Field(ge=0, le=1)]


class LossConfig(Section):
    """A weighted sum of terms over every supervised level; by default Dice and cross-entropy.

    Example:
        loss: {terms: {dice: 1, focal: 1}, class_weights: {tumour: 3}}
    """

    terms: dict[TermName, Weight] = Field({"dice": 1.0, "cross_entropy": 1.0}, min_length=1)
    """The weight of each term in the sum."""
    class_weights: dict[str, Weight] = Field({})
    """The weight of each class or region, by name; 1 if not given. In cross_entropy, focal and
    top_k it weights voxels (those of `background` too); in the other terms it weights classes
    (`background` only in generalised_dice). A weight that changes nothing is refused."""
    level_weights: list[Annotated[float, Field(ge=0)]] | None = Field(None, min_length=1)
    """The weight of each supervised level, finest first, relative to their sum. The first is above
    0, because only the finest level predicts. Default: each level has half the weight of the next
    finer one."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """The power of (1 - p) in `focal`; at 0, `focal` is the cross-entropy."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of voxels that `top_k` uses: those with the largest cross-entropy."""
    false_positives: Mistake = 0.3
    """Weight of a false positive in `tversky` and `focal_tversky`. If this and the next are 0.5,
    Tversky's index is Dice."""
    false_negatives: Mistake = 0.7
    """Weight of a false negative in `tversky` and `focal_tversky`."""
    focal_tversky_gamma: Annotated[float, Field(ge=1, le=3)] = 4 / 3
    """`focal_tversky` is (1 - Tversky's index) to the power of 1 / focal_tversky_gamma."""
    boundary_reach: Few = 8
    """The largest distance, in voxels along each axis, that `boundary` measures."""
    centre_line_iterations: Few = 5
    """Number of thinning steps in `centre_line`: the radius in voxels of the widest tube."""

    @property
    def is_plain(self) -> bool:
        """Whether this is the default: Dice plus cross-entropy, without class or level weights."""
        plain = self.terms == {"dice": 1.0, "cross_entropy": 1.0}
        return plain and not self.class_weights and self.level_weights is None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if all(name in ADDED for name in self.terms):
            raise ValueError(
                "terms must include a term that counts voxels or overlap, found only "
                f"{' and '.join(self.terms)}; add one, such as dice: 1"
            )
        if self.level_weights is not None and not self.level_weights[0] > 0:
            raise ValueError(
                "the first of level_weights must be above 0, found 0, because only the finest "
                "level predicts; give it a number above 0"
            )
        if self.false_positives + self.false_negatives == 0:
            raise ValueError("false_positives and false_negatives are both 0; give one above 0")
        return self
