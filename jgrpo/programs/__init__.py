"""The jitted programs of a run."""
