"""The engine of an evaluation: one process a configuration, its samples and what it measures."""
