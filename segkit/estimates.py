"""What a config's training step takes of memory, before there is one."""

from segkit.build import build_network, build_variation, volume_patch
from segkit.config import Config, ModelDescription
from segkit.memory import MOMENTS, StepMemory, step_memory


def memory_of_step(config: Config, description: ModelDescription, *, half: bool) -> StepMemory:
    """The estimate for one training step, in half precision (mixed) or in single."""
    patch_size = volume_patch(description)
    _, margin = build_variation(
        config.data, patch_size, spacing=description.spacing, labels=list(description.labels)
    )
    return step_memory(
        build_network(description),
        in_channels=len(description.channels),
        patch_size=patch_size,
        margin=margin,
        batch_size=config.data.batch_size,
        moments=MOMENTS[config.train.optimiser],
        averaged=config.train.averaging is not None,
        half=half,
    )
