"""napari plugin of segkit: a reader, a widget that segments, and one that shows attention maps.

`layers` and `reader` need no napari, and `predict` needs it neither. Only `widget` does.
"""
