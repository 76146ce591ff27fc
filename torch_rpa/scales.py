"""Scales with which an 8-bit cache holds the keys and values of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from jax_kernels.contract.cache import QUANTIZED_DTYPES
from torch_rpa.options import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Other texts may have entries that are so much larger, which are not clipped yet.
_MARGIN = 1.05


class KVScales(NamedTuple):
    """What keys and values are divided by before the cache stores them."""

    k_scale: float
    v_scale: float


def measure_kv_scales(
    model: PreTrainedModel,
    prompts: Iterable[Sequence[int] | torch.Tensor],
    *,
    dtype: torch.dtype,
) -> KVScales:
    """Measures one scale for all keys of a model, and one for all its values.

    The model reads the prompts, and the largest entries of all layers become the
    largest number of the dtype, with 5 % to spare. Larger ones in other texts are
    clipped, so give texts of the kind that the model will read and write. Heads and
    layers share a scale: where a few have far larger entries than the others, as keys
    of some models do, int8 leaves little precision to the others.

    Args:
        model: A causal language model of transformers, where it is to run. Whatever
            its attention is, it has the same one afterwards.
        prompts: Token ids of each, without padding.
        dtype: Of the cache: ``torch.int8``, ``torch.float8_e4m3fn`` or
            ``torch.float8_e5m2``.

    Returns:
        ``(k_scale, v_scale)``, as engines, ``generate`` and ``RPAContext`` take them.

    Raises:
        ValueError: There is no prompt, one is empty or is something else, the model
            trains, the dtype is not one of these, or keys or values are not finite.
        NotImplementedError: The model, or an adapter, is not supported with paged
            caches.
    """
    dtypes = [torch_dtype(name) for name in QUANTIZED_DTYPES]
    if dtype not in dtypes:
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, dtypes))}, got {dtype!r}; the "
            "others need no scales"
        )
    # Only now: torch alone is enough for the package.
    from torch_rpa.transformers.largest_entries import largest_entries

    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    largest = largest_entries(model, prompts)
    # If all are zero, any scale will do.
    return KVScales(*(_MARGIN * entry / limits.max or 1.0 for entry in largest))
