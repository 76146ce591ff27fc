"""Scales of the keys or the values of a whole model, as its callers give them.

A number holds for all layers and is a part of every compiled program. Anything else is
one entry for each layer, which the operator gets as a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from jax_kernels.contract.options import check_factor

LayerScales: TypeAlias = (
    float | torch.Tensor | Sequence[float | Sequence[float] | torch.Tensor]
)
# The same as numbers, which can be compared: one, or for each layer one or its heads'.
ScaleNumbers: TypeAlias = float | tuple[float | tuple[float, ...], ...]


def scale_numbers(name: str, scales: Any) -> ScaleNumbers | None:
    """Returns scales as numbers, or None for None.

    Args:
        name: Of the argument, for errors.
        scales: A number; or a tensor ``[layers]`` or ``[layers, Hkv]``; or a sequence
            with a number, numbers or a tensor for each layer.

    Raises:
        ValueError: It is something else, or a scale is no factor.
    """
    numbers = _plain(scales)
    if isinstance(numbers, list):
        return tuple(_of_layer(name, n, layer) for layer, n in enumerate(numbers))
    try:
        return check_factor(name, numbers)
    except ValueError as error:
        raise ValueError(
            f"{error}; with an entry for each layer: a tensor [layers] or [layers, "
            "Hkv], or a sequence of numbers or tensors [Hkv]"
        ) from None


def scale_tensors(
    name: str,
    scales: LayerScales | None,
    num_key_heads: Sequence[int],
    device: torch.device | str,
) -> float | list[torch.Tensor] | None:
    """Returns what ``RPAContext`` takes on a device.

    Args:
        name: Of the argument, for errors.
        scales: See :func:`scale_numbers`.
        num_key_heads: Of each layer.
        device: Where the model is.

    Returns:
        A number or None as they are, else float32 ``[Hkv]`` for each layer.

    Raises:
        ValueError: See there; or there are not as many as layers, or as heads.
    """
    numbers = scale_numbers(name, scales)
    if not isinstance(numbers, tuple):
        return numbers
    if len(numbers) != len(num_key_heads):
        raise ValueError(
            f"{name} must be a number or have an entry for each of the "
            f"{len(num_key_heads)} layers, got {len(numbers)}"
        )
    for layer, (entry, heads) in enumerate(zip(numbers, num_key_heads, strict=True)):
        if isinstance(entry, tuple) and len(entry) != heads:
            raise ValueError(
                f"{name} must have one number, or one for each of the {heads} key "
                f"heads, in layer {layer}, got {len(entry)}"
            )
    # One for each head in any case: torch_xla would make a tensor [] of 1 a constant,
    # and so another program.
    return [
        torch.tensor(entry, dtype=torch.float32).expand(heads).contiguous().to(device)
        for entry, heads in zip(numbers, num_key_heads, strict=True)
    ]


def stacked(scales: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Returns scales of layers as one tensor, if all layers have as many."""
    shapes = {scale.shape for scale in scales}
    return torch.stack([*scales]) if len(shapes) == 1 else tuple(scales)


def _plain(scales: Any) -> Any:
    """Returns tensors and sequences as lists."""
    if isinstance(scales, torch.Tensor):
        return scales.tolist()
    # KVScales, which has the scales of keys and of values, is no sequence of layers.
    is_pair_or_text = isinstance(scales, str | bytes) or hasattr(scales, "_fields")
    if isinstance(scales, Sequence) and not is_pair_or_text:
        return [_plain(entry) for entry in scales]
    return scales


def _of_layer(name: str, numbers: Any, layer: int) -> float | tuple[float, ...]:
    name = f"{name} of layer {layer}"
    entries = numbers if isinstance(numbers, list) else [numbers]
    checked = tuple(check_factor(name, entry) for entry in entries)
    if not checked or None in checked:
        raise ValueError(f"{name} must be a number or one for each head, got {numbers}")
    found = tuple(number for number in checked if number is not None)
    return found if isinstance(numbers, list) else found[0]
