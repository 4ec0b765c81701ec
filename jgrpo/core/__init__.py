"""Pure functions of arrays: advantages, divergences, losses, log-probabilities. No config object, no I/O."""
