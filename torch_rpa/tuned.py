"""Block sizes that users have tuned, ahead of those that the package ships."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from jax_kernels import tuned


def tuned_block_sizes(*files: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Inside the block kernels take their block sizes from these files first.

    Where files have no record for a shape and chip, or none as near as one that the
    package ships, block sizes are as outside. The environment variable
    ``TORCH_RPA_TUNED_BLOCK_SIZES`` names files in the same way for a whole process,
    separated like those of ``PATH``; it is read once, before the first kernel.

    The records in force are those of the moment when a call is traced. In lazy mode
    that is each call, so that entering a block compiles the next step anew, once for
    the same records. A graph that ``torch.compile`` holds keeps the block sizes that it
    was compiled with: enter the block before its first call. It holds for all threads.
    ``block_sizes=`` of a call goes ahead of every record. On the CPU, as an XLA device
    or as plain tensors, there is no kernel, and the files have no effect on results.

    Args:
        files: As ``python -m benchmarks.tune --output`` and ``jax_kernels.tuned.save``
            write them. Of equally near records, that of the first file is taken.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file holds something else, which the message names.
    """
    return tuned.applied(*files)
