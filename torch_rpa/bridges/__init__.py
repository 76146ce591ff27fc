"""The ways from torch's operator to the JAX functions, one file for each framework."""
