"""Everything with side effects: optimiser state, checkpoints, metrics on disk, the progress line."""
