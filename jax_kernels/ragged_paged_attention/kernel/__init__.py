"""The Pallas kernel: what its two loops share; the loops are in decode/ and tiles/."""
