"""Settings of the loss: terms that are added, and weights of classes and levels."""

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
"""Terms that do not hold a network to volumes, so that another must stand beside them."""

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
    """By the name of a class or region, how much it counts; 1 if not given. In cross_entropy, focal
    and top_k this is a weight of voxels (that of `background` too), in the others of classes."""
    level_weights: list[Annotated[float, Field(ge=0)]] | None = Field(None, min_length=1)
    """How much each supervised level counts, finest first, in shares of their sum; each half the
    next finer one's if not given."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """The power of (1 - p) in `focal`; at 0 it is the cross-entropy."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of voxels, those with the largest cross-entropy, that count in `top_k`."""
    false_positives: Mistake = 0.3
    """What a false alarm costs in `tversky` and `focal_tversky`; 0.5 and 0.5 make it Dice."""
    false_negatives: Mistake = 0.7
    """What a missed voxel costs in `tversky` and `focal_tversky`."""
    focal_tversky_gamma: Annotated[float, Field(ge=1, le=3)] = 4 / 3
    """One minus Tversky's index is taken to the power of one over this in `focal_tversky`."""
    boundary_reach: Few = 8
    """Voxels along each axis up to which `boundary` measures distances."""
    centre_line_iterations: Few = 5
    """Steps of thinning in `centre_line`: the radius in voxels of the widest tube."""

    @property
    def is_plain(self) -> bool:
        """Whether this is Dice plus cross-entropy, of all classes and levels as by default."""
        plain = self.terms == {"dice": 1.0, "cross_entropy": 1.0}
        return plain and not self.class_weights and self.level_weights is None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if all(name in ADDED for name in self.terms):
            raise ValueError(
                f"terms has only {' and '.join(self.terms)}, which needs a term beside it that "
                f"counts voxels or overlap; add one, such as dice: 1"
            )
        if self.level_weights is not None and not sum(self.level_weights) > 0:
            raise ValueError("level_weights are all 0, so that nothing trains; give one above 0")
        if self.false_positives + self.false_negatives == 0:
            raise ValueError("false_positives and false_negatives are both 0; give one above 0")
        return self
