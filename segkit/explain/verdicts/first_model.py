"""The first of a predictor's models, walked over an image without mirror images."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from segkit.inference.predictor import Predictor
from segkit.inference.source_rows import WALK_AXIS
from segkit.inference.windows import Slab, WindowFunction, stream


def slabs_of_first(
    predictor: Predictor, image: Float[Tensor, "channel x y z"], function: WindowFunction
) -> Iterator[Slab]:
    """Slabs of the function's blended outputs, in the windows of the first model."""
    member = predictor.members[0]
    return stream(
        image,
        function,
        member.layout,
        axis=WALK_AXIS,
        batch_size=member.batch_size,
    )
