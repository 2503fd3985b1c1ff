"""Attributions: what each part of an image contributes to the segmentation of a structure."""
