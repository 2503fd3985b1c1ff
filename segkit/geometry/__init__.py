"""Grids in world coordinates, and resampling between them."""
