"""Scales with which an 8-bit cache holds the keys and values of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from jax_kernels.contract.cache import QUANTIZED_DTYPES
from jax_kernels.contract.options import LARGEST_FACTOR
from torch_rpa.layer_scales import (
    LayerScales,
    ScaleNumbers,
    scale_numbers,
    stacked,
)
from torch_rpa.options import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Other texts may have entries that are so much larger, which are not clipped yet.
_MARGIN = 1.05

Granularity = Literal["model", "layer", "head"]


class KVScales(NamedTuple):
    """What keys and values are divided by before the cache stores them.

    Each is a number, for all layers; or a float32 tensor ``[layers]``, or ``[layers,
    Hkv]`` with one for each key head; or, if heads differ from layer to layer, a tuple
    with a tensor for each layer.
    """

    k_scale: LayerScales
    v_scale: LayerScales

    def to(self, device: torch.device | str) -> KVScales:
        """The same on a device, as ``RPAContext`` needs tensors there."""
        return KVScales(*(_to(scales, device) for scales in self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the scales to a JSON file, in words that :meth:`load` reads."""
        numbers = {
            name: _numbers(name, scales) for name, scales in self._asdict().items()
        }
        Path(path).write_text(json.dumps(numbers) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KVScales:
        """Reads the scales of a file that :meth:`save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected scales in JSON, got {error}") from None
        if not isinstance(found, dict) or set(found) != set(cls._fields):
            raise ValueError(
                f"{path}: expected an object with {' and '.join(cls._fields)}, got "
                f"{sorted(found) if isinstance(found, dict) else found!r}"
            )
        return cls(*(_loaded(f"{path}: {name}", found[name]) for name in cls._fields))


def measure_kv_scales(
    model: PreTrainedModel,
    prompts: Iterable[Sequence[int] | torch.Tensor],
    *,
    dtype: torch.dtype,
    granularity: Granularity = "model",
) -> KVScales:
    """Measures the scales of the keys and values of a model.

    The model reads the prompts, and the largest entries that share a scale become the
    largest number of the dtype, with 5 % to spare. Larger ones in other texts are
    clipped, so give texts of the kind that the model will read and write.

    Args:
        model: A causal language model of transformers, where it is to run. Whatever
            its attention is, it has the same one afterwards.
        prompts: Token ids of each, without padding.
        dtype: Of the cache: ``torch.int8``, ``torch.float8_e4m3fn`` or
            ``torch.float8_e5m2``.
        granularity: What has a scale of its own: the ``"model"``, each ``"layer"``, or
            each key ``"head"`` of each layer. Where a few heads have far larger entries
            than the others, as keys of some models do, a common scale leaves little
            precision to the others in int8.

    Returns:
        ``(k_scale, v_scale)``, as engines, ``generate`` and, on the device of the
        model, ``RPAContext`` take them. Numbers for the model, else tensors on the CPU,
        whose numbers are no part of a compiled program.

    Raises:
        ValueError: There is no prompt, one is empty or is something else, the model
            trains, the dtype or granularity is not one of these, or keys or values are
            not finite.
        NotImplementedError: The model, or an adapter, is not supported with paged
            caches.
    """
    dtypes = [torch_dtype(name) for name in QUANTIZED_DTYPES]
    if dtype not in dtypes:
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, dtypes))}, got {dtype!r}; the "
            "others need no scales"
        )
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"granularity must be one of {', '.join(map(repr, get_args(Granularity)))},"
            f" got {granularity!r}"
        )
    # Only now: torch alone is enough for the package.
    from torch_rpa.transformers.largest_entries import largest_entries

    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    largest = largest_entries(model, prompts)
    return KVScales(*(_scales(entries, granularity, limits.max) for entries in largest))


def _scales(
    largest: Sequence[torch.Tensor], granularity: Granularity, limit: float
) -> LayerScales:
    """Returns scales for the largest entries of each layer, float32 ``[Hkv]``."""
    if granularity == "model":
        entry = max(entries.max().item() for entries in largest)
        # If all are zero, any scale will do.
        return max(_MARGIN * entry / limit, 1 / LARGEST_FACTOR) if entry else 1.0
    if granularity == "layer":
        largest = [entries.max() for entries in largest]
    return stacked(
        [
            torch.where(
                entries > 0, (_MARGIN / limit * entries).clamp(1 / LARGEST_FACTOR), 1.0
            )
            for entries in largest
        ]
    )


def _to(scales: Any, device: torch.device | str) -> Any:
    if isinstance(scales, torch.Tensor):
        return scales.to(device)
    if isinstance(scales, list | tuple):
        return tuple(_to(entry, device) for entry in scales)
    return scales


def _numbers(name: str, scales: Any) -> ScaleNumbers:
    """Returns the numbers of scales that a file may hold."""
    numbers = scale_numbers(name, scales)
    if numbers is None or numbers == ():
        raise ValueError(f"{name} must be a number or numbers, got {scales!r}")
    return numbers


def _loaded(name: str, numbers: Any) -> LayerScales:
    checked = _numbers(name, numbers)
    if not isinstance(checked, tuple):
        return checked
    return stacked([torch.tensor(entry, dtype=torch.float32) for entry in checked])
