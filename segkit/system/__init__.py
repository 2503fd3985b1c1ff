"""The machine: memory, devices, processes, signals and progress displays."""
