"""Training: the trainer, its step, optimizer, hooks, and processes."""
