"""What a call of ragged paged attention means and accepts, free of JAX and of torch.

The rules stand here once. The JAX functions and the PyTorch operator both call them, so
that the same mistake gives the same error everywhere:

* ``options``: the parameters that are not arrays, and the rules of their values.
* ``cache``: the geometry of the paged cache, from its sizes or from its shape.
* ``arguments``: shapes and dtypes of the arrays, and how they fit together.
* ``metadata``: the numbers in lengths, page table and distribution.

What is wrong is a ``ValueError`` that names the argument, what it must be and what it
is. What would have a meaning and is not supported is a ``NotImplementedError`` that
names another way. Dtypes go by name here, as in ``"bfloat16"``.
"""

from jax_kernels.contract.arguments import Arguments as Arguments
from jax_kernels.contract.arguments import ArraySpec as ArraySpec
from jax_kernels.contract.arguments import CallSizes as CallSizes
from jax_kernels.contract.arguments import check_arguments as check_arguments
from jax_kernels.contract.cache import CacheGeometry as CacheGeometry
from jax_kernels.contract.cache import cache_geometry as cache_geometry
from jax_kernels.contract.metadata import Metadata as Metadata
from jax_kernels.contract.metadata import check_metadata as check_metadata
from jax_kernels.contract.metadata import check_ranges as check_ranges
from jax_kernels.contract.options import AttentionOptions as AttentionOptions
