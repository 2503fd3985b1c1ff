"""`segkit demo`: an embedded task, trained, segmented and explained in minutes."""
