"""Colours of labels, the same in every picture of them."""

import colorsys

LABEL_COLOURS = ["#4c9be8", "#f2a33a", "#e0507a", "#58b368", "#9a6fd0", "#c7b446"]
GOLDEN_RATIO = 0.618034


def label_colour(number: int) -> str:
    """The colour of a label from 1 on, as '#rrggbb'; past the named ones hues far from the last."""
    if number <= len(LABEL_COLOURS):
        return LABEL_COLOURS[number - 1]
    hue = number * GOLDEN_RATIO % 1.0
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.6, 0.55))
    return f"#{red:02x}{green:02x}{blue:02x}"
