"""Networks: tensors in, tensors out. Nothing here knows of files, settings or millimetres."""
