"""Models: networks built from a description, and model folders on disk."""
