"""The machine: resources, speed, processes, signals, progress."""
