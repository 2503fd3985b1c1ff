"""Planning: from a dataset to the config of a training on this machine."""
