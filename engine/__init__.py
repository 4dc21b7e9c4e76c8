"""The training engine: a hook-based loop, its configuration, its data and its results."""
