"""From a dataset to a training plan for this machine."""
