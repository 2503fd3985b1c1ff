"""From a dataset folder to batches: cases, preprocessing, patches, augmentation and synthesis."""
