"""Joins attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from jax_kernels.contract.options import INPUT_DTYPES
from torch_rpa.options import dtype_name


def merge_attention(
    outs: Iterable[torch.Tensor], lses: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the attention over all keys, and its logarithms.

    The parts are those of :func:`torch_rpa.ragged_paged_attention` with ``return_lse``,
    for the same queries. No key may be in two parts, and sinks, which count as one, in
    one of them alone. With weights that are the shares of the parts in the denominator,
    ``exp(lse_part - lse)``, the output is the weighted mean of the parts; this is exact
    but for the rounding of the parts (section 3 of arXiv 2501.01005).

    Args:
        outs: Outputs of one shape ``[..., D]``, all bfloat16 or all float32, one for
            each part.
        lses: float32 ``[...]``, natural logarithms, in the same order. Minus infinity
            means that the part has no key, and infinity that a sink takes all.

    Returns:
        ``[..., D]`` in the dtype of the parts, computed in float32, and float32
        ``[...]``. Where no part has a key they are zero and minus infinity.

    Raises:
        ValueError: There is no part, or shapes, dtypes or devices do not fit.
        NotImplementedError: Parts of another dtype.
    """
    outs, lses = tuple(outs), tuple(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            "outs and lses must have as many parts, at least one, got "
            f"{len(outs)} and {len(lses)}"
        )
    first = outs[0]
    if not first.dim():
        raise ValueError("outs[0] must have shape [..., D], got []")
    if dtype_name(first.dtype) not in INPUT_DTYPES:
        raise NotImplementedError(
            f"outs of {first.dtype} are not supported: cast them to bfloat16 or float32"
        )
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != first.shape or out.dtype != first.dtype:
            raise ValueError(
                f"outs[{index}] must be {first.dtype} {list(first.shape)} as outs[0], "
                f"got {out.dtype} {list(out.shape)}"
            )
        if lse.shape != first.shape[:-1] or lse.dtype != torch.float32:
            raise ValueError(
                f"lses[{index}] must be torch.float32 {list(first.shape[:-1])}, got "
                f"{lse.dtype} {list(lse.shape)}"
            )
        for name, tensor in (("outs", out), ("lses", lse)):
            if tensor.device != first.device:
                raise ValueError(
                    f"{name}[{index}] must be on the device of outs[0], "
                    f"{first.device}, got {tensor.device}"
                )
    return merge_stacked(torch.stack(outs), torch.stack(lses))


def merge_stacked(
    outs: torch.Tensor, lses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`merge_attention` of parts that are one tensor, along its first axis."""
    with torch.no_grad():  # the result is the same whatever is taken off
        peak = lses.amax(dim=0)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)  # (-inf) - (-inf) is NaN
    # So is inf - inf.
    weights = (lses - peak).masked_fill(lses == torch.inf, 0.0).exp()
    total = weights.sum(dim=0)
    shares = weights / total.masked_fill(total == 0.0, 1.0)
    merged = (shares.unsqueeze(-1) * outs.float()).sum(dim=0)
    return merged.to(outs.dtype), peak + total.log()
