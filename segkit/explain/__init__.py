"""Attention maps on the patient's own grid, and what they mean."""
