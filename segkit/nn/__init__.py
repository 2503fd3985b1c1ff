"""Networks: tensors in, tensors out. This room uses no files, no settings and no millimetres."""
