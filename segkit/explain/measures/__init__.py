"""Measures of how well a map localises each structure."""
