"""Explanations of a segmentation: attention maps in the patient's space, measures and verdicts."""
