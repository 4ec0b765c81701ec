"""The same work in other systems, each in an environment of its own, turn by turn with ours."""
