"""The parts of the optimizer: its window, losses, resolution, saving, and what it wraps."""
