"""What a config's training step takes of memory, before there is one."""

from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.model.build import build_network, build_variation, channels_in, volume_patch
from segkit.training.memory import MOMENTS, StepMemory, step_memory


def margin_of(config: Config, description: ModelDescription) -> tuple[int, ...]:
    """Voxels that are cut beyond either end of a patch."""
    _, margin = build_variation(
        config.data,
        volume_patch(description),
        spacing=description.spacing,
        labels=description.labelling.value_names,
    )
    return margin


def memory_of_step(config: Config, description: ModelDescription, *, half: bool) -> StepMemory:
    """The estimate for one training step, in half precision (mixed) or in single."""
    patch_size = volume_patch(description)
    margin = margin_of(config, description)
    return step_memory(
        build_network(description),
        in_channels=channels_in(description),
        patch_size=patch_size,
        margin=margin,
        batch_size=config.data.batch_size,
        moments=MOMENTS[config.train.optimiser],
        averaged=config.train.averaging is not None,
        half=half,
    )
