"""From a dataset folder to batches: cases, one prepared form, patches, augmentation, synthesis."""
