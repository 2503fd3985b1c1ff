"""Scores of a segmentation against a reference: overlap, surface distances, and their tables."""
