"""The training loop and a run's files."""
