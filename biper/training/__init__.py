"""Settings, the trainer and its loop, checkpoints, several processes, and what a run leaves to read."""
