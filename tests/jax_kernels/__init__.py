"""Tests of ``jax_kernels``."""
