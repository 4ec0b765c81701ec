"""One file a command; jgrpo.cli dispatches."""
