"""Attention kernels for TPUs in JAX, one package for each.

``jax_kernels.ragged_paged_attention`` has the kernel. Importing this package alone
imports nothing else, so that what is free of JAX here can be used without it.
"""
