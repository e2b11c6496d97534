"""A training run: its state, its checkpoints and logs, and how it survives faults."""
