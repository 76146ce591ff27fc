"""The kernel inside programs of others; each package needs the program it is for."""
