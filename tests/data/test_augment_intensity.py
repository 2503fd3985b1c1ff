import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Generator, Tensor
from torch.testing import assert_close

from segkit.data.augment_intensity import (
    IntensityVariation,
    blur,
    gamma_curve,
    gaussian_weights,
    lower_resolution,
    stretch_contrast,
)

STEPS = (
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "inverted_gamma",
    "gamma",
)
NOTHING = {f"{step}_probability": 0.0 for step in STEPS}


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def only(*steps: str, **settings: Any) -> IntensityVariation:
    """A variation that does these steps for certain, to every channel, and no others."""
    certain: dict[str, Any] = {f"{step}_probability": 1.0 for step in steps}
    for step in steps:
        if step in ("blur", "low_resolution"):
            certain[f"{step}_channel_probability"] = 1.0
    return IntensityVariation(**{**NOTHING, **certain, **settings})


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(0))


def likely(count: int, total: int, probability: float) -> bool:
    """Whether a count lies within four standard deviations of what is expected."""
    deviation = math.sqrt(total * probability * (1 - probability))
    return abs(count - total * probability) <= 4 * deviation


def test_with_probabilities_zero_intensities_stay() -> None:
    image = normal(3, 2, 6, 5, 4)
    assert torch.equal(IntensityVariation(**NOTHING)(image, seeded(1)), image)


@pytest.mark.parametrize(
    ("step", "probability"),
    # nnU-Net's, of samples; blur and low resolution are drawn for each channel as well.
    [
        ("noise", 0.1),
        ("brightness", 0.15),
        ("contrast", 0.15),
        ("inverted_gamma", 0.1),
        ("gamma", 0.3),
        ("blur", 0.2),
        ("low_resolution", 0.25),
    ],
)
def test_each_step_comes_at_its_probability(step: str, probability: float) -> None:
    usual = IntensityVariation()
    by_channel = step in ("blur", "low_resolution")
    settings = {f"{step}_probability": getattr(usual, f"{step}_probability")}
    if step == "low_resolution":
        settings["low_resolution_zoom"] = (0.5, 0.5)
    vary = IntensityVariation(**{**NOTHING, **settings})
    image = normal(1000, 2, 6, 1, 1)

    changed = (vary(image, seeded(3)) != image).flatten(2).any(2)

    either, both = changed.any(1), changed.all(1)
    # A channel of a sample that is drawn is left out every other time.
    assert likely(int(either.sum()), 1000, probability * (0.75 if by_channel else 1))
    assert likely(int(both.sum()), 1000, probability * (0.25 if by_channel else 1))
    assert likely(int(changed[:, 0].sum()), 1000, probability * (0.5 if by_channel else 1))


def test_steps_follow_one_another_in_nnu_nets_order() -> None:
    """With every amount settled, the whole is the functions one after the other."""
    settled: dict[str, Any] = {
        "noise_variance": (0.0, 0.0),
        "blur_sigma": (0.8, 0.8),
        "brightness": (1.2, 1.2),
        "contrast": (1.25, 1.25),
        "low_resolution_zoom": (0.5, 0.5),
        "gamma": (1.5, 1.5),
    }
    image = normal(2, 2, 8, 6, 6)

    varied = only(*STEPS, **settled)(image, seeded(0))

    rows = blur(image.flatten(0, 1), torch.full((4, 3), 0.8))
    rows = stretch_contrast(rows * 1.2, torch.full((4,), 1.25))
    rows = lower_resolution(rows, torch.full((4,), 0.5))
    rows = -gamma_curve(-rows, torch.full((4,), 1.5))
    rows = gamma_curve(rows, torch.full((4,), 1.5))
    assert_close(varied, rows.view_as(image))


def test_noise_comes_before_blur() -> None:
    vary = only("noise", "blur", noise_variance=(0.1, 0.1), blur_sigma=(1.0, 1.0))
    noise = vary(torch.zeros(2, 1, 24, 24, 24), seeded(0))[..., 3:-3, 3:-3, 3:-3]
    # Each axis multiplies the variance of white noise with the sum of the kernel's squares, 0.28.
    kept = float(gaussian_weights(torch.ones(1, 1), 3).square().sum()) ** 3
    assert float(noise.var()) == pytest.approx(0.1 * kept, rel=0.25)


@pytest.mark.parametrize("variance", [0.01, 0.1])
def test_noise_has_the_variance_drawn_and_no_mean(variance: float) -> None:
    vary = only("noise", noise_variance=(variance, variance))
    noise = (vary(torch.ones(4, 2, 16, 16, 16), seeded(0)) - 1).flatten(2)
    assert (noise.mean(2).abs() < 5 * math.sqrt(variance / 4096)).all()
    # The variance of 4096 normal numbers has a deviation of 2.2 %.
    assert_close(noise.var(2), torch.full((4, 2), variance), rtol=0.1, atol=0)
    standard = noise / math.sqrt(variance)
    assert_close((standard.abs() < 1).float().mean(), torch.tensor(0.6827), atol=0.01, rtol=0)


def test_channels_share_the_noises_variance_and_not_the_noise() -> None:
    noise = only("noise")(torch.zeros(20, 2, 16, 16, 16), seeded(0)).flatten(2)
    variances = noise.var(2)
    assert_close(variances[:, 0], variances[:, 1], rtol=0.2, atol=0)
    assert variances.min() < 0.02 and 0.08 < variances.max() < 0.11
    for first, second in noise:
        assert torch.stack([first, second]).corrcoef()[0, 1].abs() < 0.1


def test_brightness_multiplies_intensities() -> None:
    image = normal(3, 2, 6, 5, 4)
    assert_close(only("brightness", brightness=(1.2, 1.2))(image, seeded(1)), image * 1.2)


def test_every_channel_of_every_sample_is_varied_by_a_factor_of_its_own() -> None:
    image = torch.rand(4, 3, 6, 5, 1, generator=seeded(0)) + 1
    ratio = (only("brightness")(image, seeded(1)) / image).flatten(2)
    assert_close(ratio, ratio[..., :1].expand_as(ratio))
    factors = ratio[..., 0].flatten()
    assert len(factors.unique()) == 12
    assert 0.75 <= factors.min() < 0.9 and 1.1 < factors.max() <= 1.25


def test_factors_and_exponents_lie_below_one_as_often_as_above() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1).expand(1000, 1, -1, -1, -1)
    factors = only("brightness")(image, seeded(1))[:, 0, 2, 0, 0]
    bent = only("gamma")(image, seeded(1))[:, 0, :, 0, 0]
    share = (bent[:, 1] - bent[:, 0]) / (bent[:, 2] - bent[:, 0])
    exponents = -share.log2()
    for values, low, high in [(factors, 0.75, 1.25), (exponents, 0.7, 1.5)]:
        assert likely(int((values < 1).sum()), 1000, 0.5)
        assert low - 1e-4 < values.min() < low + 0.02 and high - 0.02 < values.max() < high + 1e-4
        # Evenly on either side.
        assert likely(int((values < (low + 1) / 2).sum()), 1000, 0.25)
        assert likely(int((values > (high + 1) / 2).sum()), 1000, 0.25)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_scales_about_the_mean_within_the_range(factor: float) -> None:
    image = normal(2, 2, 8, 8, 8)
    expected = torch.empty_like(image)
    for index in itertools.product((0, 1), (0, 1)):
        channel = image[index]
        stretched = (channel - channel.mean()) * factor + channel.mean()
        expected[index] = stretched.clamp(channel.min(), channel.max())
    assert_close(only("contrast", contrast=(factor, factor))(image, seeded(1)), expected)


def test_more_contrast_keeps_the_range_to_the_last_bit() -> None:
    image = normal(2, 2, 8, 8, 8)
    stretched = only("contrast", contrast=(1.1, 1.25))(image, seeded(1)).flatten(2)
    assert torch.equal(stretched.amin(2), image.flatten(2).amin(2))
    assert torch.equal(stretched.amax(2), image.flatten(2).amax(2))


@pytest.mark.parametrize("exponent", [0.7, 1.5])
def test_gamma_bends_the_range_and_keeps_mean_deviation_and_order(exponent: float) -> None:
    image = normal(2, 2, 8, 8, 8) * 3 - 5

    bent = only("gamma", gamma=(exponent, exponent))(image, seeded(1)).flatten(2)

    flat = image.flatten(2)
    assert_close(bent.mean(2), flat.mean(2), atol=1e-4, rtol=0)
    assert_close(bent.std(2), flat.std(2), atol=1e-4, rtol=0)
    assert (bent.gather(2, flat.argsort(2)).diff(dim=2) >= -1e-6).all()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    curve = ((flat - low) / (high - low)) ** exponent
    bent_low, bent_high = bent.amin(2, keepdim=True), bent.amax(2, keepdim=True)
    assert_close((bent - bent_low) / (bent_high - bent_low), curve, atol=1e-4, rtol=0)


def test_inverted_gamma_is_gamma_of_the_negative_negated() -> None:
    image = normal(2, 2, 6, 5, 4)
    plain = only("gamma", gamma=(1.4, 1.4))
    inverted = only("inverted_gamma", gamma=(1.4, 1.4))
    assert_close(inverted(image, seeded(1)), -plain(-image, seeded(1)))
    # By hand: half of the range, squared, is a quarter from whichever end is counted from.
    ramp = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1)
    for step, share in [("gamma", 0.25), ("inverted_gamma", 0.75)]:
        low, half, high = only(step, gamma=(2.0, 2.0))(ramp, seeded(1)).flatten().tolist()
        assert (half - low) / (high - low) == pytest.approx(share, abs=1e-5)


def test_bending_by_one_is_the_identity() -> None:
    rows = normal(3, 6, 5, 4) * 40 + 100
    assert_close(gamma_curve(rows, torch.ones(3)), rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sigma", [0.5, 0.77, 1.0])
def test_a_blurs_kernel_is_a_gaussian_that_sums_to_one(sigma: float) -> None:
    kernel = gaussian_weights(torch.tensor([[sigma]]), 3)[0, 0]
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert_close(kernel, kernel.flip(0))
    assert kernel[4] / kernel[3] == pytest.approx(math.exp(-0.5 / sigma**2), rel=1e-5)


def test_a_blur_shows_its_kernel_at_a_lone_voxel_and_each_row_its_own() -> None:
    rows = torch.zeros(2, 9, 9, 1)
    rows[:, 4, 4, 0] = 1
    sigmas = torch.tensor([[0.5, 1.0, 0.7], [0.8, 0.6, 0.7]])
    seen = blur(rows, sigmas)[:, 1:8, 1:8, 0]
    kernels = gaussian_weights(sigmas, 3)
    assert_close(seen, kernels[:, 0, :, None] * kernels[:, 1, None, :])


def test_a_blur_keeps_a_constant_and_the_sum_of_an_object_inside() -> None:
    sigmas = torch.tensor([[0.5, 0.9, 1.0]])
    constant = torch.full((1, 5, 4, 1), 0.3)
    assert_close(blur(constant, sigmas), constant)
    inside = torch.zeros(1, 11, 12, 13)
    inside[:, 3:-3, 3:-3, 3:-3] = normal(1, 5, 6, 7)
    assert_close(blur(inside, sigmas).sum(), inside.sum(), atol=1e-4, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("space", [(9, 8, 7), (12, 10), (2, 5, 1)])
def test_blur_equals_scipys(space: tuple[int, ...]) -> None:
    rows = normal(3, *space)
    sigmas = torch.rand(3, len(space), generator=seeded(1)) * 0.5 + 0.5
    expected = np.stack(
        [
            ndimage.gaussian_filter(
                row.numpy().astype(np.float64), sigma.tolist(), radius=3, mode="nearest"
            )
            for row, sigma in zip(rows, sigmas, strict=True)
        ]
    )
    assert_close(blur(rows, sigmas), torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_the_variation_blurs_with_sigmas_between_its_bounds_along_each_axis_apart() -> None:
    image = torch.zeros(20, 1, 15, 15, 15)
    image[:, :, 7, 7, 7] = 1
    seen = only("blur")(image, seeded(0))
    peak = seen[:, 0, 7, 7, 7]
    sigmas = []
    for beside in (seen[:, 0, 8, 7, 7], seen[:, 0, 7, 8, 7], seen[:, 0, 7, 7, 8]):
        sigmas.append((-0.5 / (beside / peak).log()).sqrt())
    drawn = torch.stack(sigmas)
    assert drawn.min() > 0.5 - 1e-4 and drawn.max() < 1 + 1e-4
    assert drawn.min() < 0.55 and drawn.max() > 0.95
    assert ((drawn[0] - drawn[1]).abs() > 1e-3).all() and len(drawn.unique()) == 60


def test_low_resolution_at_a_zoom_of_one_is_the_identity() -> None:
    image = normal(2, 2, 6, 5, 4)
    vary = only("low_resolution", low_resolution_zoom=(1.0, 1.0))
    assert torch.equal(vary(image, seeded(0)), image)


def test_a_ramp_at_low_resolution_equals_values_worked_out_by_hand() -> None:
    # Of 0 1 2 3 every other is picked, 1 and 3, which stand where 0.5 and 2.5 did; 1.5 and 2 are
    # a quarter and three quarters between them, and nothing lies beyond them.
    ramp = torch.arange(4.0).view(1, 4, 1, 1)
    half = torch.tensor([0.5])
    assert lower_resolution(ramp, half).flatten().tolist() == [1, 1.5, 2.5, 3]
    plane = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 6)
    expected = torch.tensor([1, 1.5, 2.5, 3]).view(1, 4, 1).expand(1, 4, 6)
    assert_close(lower_resolution(plane, half), expected)


def test_low_resolution_lowers_each_row_by_its_own_zoom_and_spares_axes() -> None:
    rows = normal(3, 8, 7, 6)
    zooms = torch.tensor([0.5, 1.0, 0.75])
    together = lower_resolution(rows, zooms)
    for row in range(3):
        alone = lower_resolution(rows[row : row + 1], zooms[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together[1], rows[1]) and not torch.equal(together[2], rows[2])
    # With the last axis spared, each of its slices is lowered alone, as a plane.
    spared = lower_resolution(rows, zooms, kept_axes=(2,))
    for index in range(6):
        assert_close(spared[..., index], lower_resolution(rows[..., index], zooms))
    vary = only("low_resolution", low_resolution_zoom=(0.5, 0.5), low_resolution_kept_axes=(2,))
    whole = torch.full((3,), 0.5)
    expected = lower_resolution(rows, whole, kept_axes=(2,))
    assert_close(vary(rows[None], seeded(0))[0], expected)


def test_a_constant_image_survives_every_step_but_noise() -> None:
    vary = only(*(step for step in STEPS if step != "noise"), brightness=(1.0, 1.0))
    image = torch.full((2, 1, 4, 4, 4), -0.3)
    assert_close(vary(image, seeded(0)), image)


@pytest.mark.parametrize("space", [(9, 7), (9, 7, 1), (9, 1, 7), (1, 9, 7)])
def test_a_slice_is_varied_alike_whichever_axis_is_thin(space: tuple[int, ...]) -> None:
    """Noise, blur and low resolution along an axis of one voxel are none."""
    image = normal(2, 1, 9, 7)
    settled = only("noise", "blur", blur_sigma=(0.8, 0.8))
    assert_close(
        settled(image.view(2, 1, *space), seeded(5)).view_as(image), settled(image, seeded(5))
    )
    assert_close(
        lower_resolution(image.view(2, *space), torch.tensor([0.6, 0.8])).view(2, 9, 7),
        lower_resolution(image[:, 0], torch.tensor([0.6, 0.8])),
    )


def test_the_seed_decides_the_intensities_and_the_image_stays() -> None:
    image = normal(4, 2, 6, 5, 4)
    before = image.clone()
    vary = IntensityVariation(**dict.fromkeys(NOTHING, 0.5))
    first, again, other = (vary(image, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(image, before)


def test_a_sample_that_is_not_drawn_is_not_touched() -> None:
    image = normal(200, 1, 4, 4, 1)
    varied = IntensityVariation()(image, seeded(0))
    untouched = (varied == image).flatten(1).all(1)
    # Neither of the seven comes; a zoom above 7/8 leaves four voxels, which is a quarter of them.
    spared = 0.9 * (1 - 0.1) * 0.85 * 0.85 * (1 - 0.125 * 0.75) * 0.9 * 0.7
    assert likely(int(untouched.sum()), 200, spared)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kind: torch.dtype) -> None:
    image = normal(2, 2, 6, 5, 4).to(kind)
    vary = only(*STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        varied = vary(image, seeded(1))
    assert varied.dtype == kind
    assert torch.equal(varied, vary(image.float(), seeded(1)).to(kind))
