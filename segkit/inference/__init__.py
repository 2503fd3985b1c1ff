"""From a model and a volume to labels, probabilities and maps on the volume's own grid."""
