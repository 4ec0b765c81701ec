"""Between the device's samples and its update."""
