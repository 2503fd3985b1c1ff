"""Models: networks built from a description, and their folders on disk."""
