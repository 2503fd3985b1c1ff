"""Attributions: how much each part of an image contributes to the segmentation of a structure."""
