"""One training run: settings, batches, optimiser, checkpoints, reports."""
