"""The metadata of a step, from what vLLM keeps of it."""

from __future__ import annotations

import torch


def distribution_of(
    query_start_loc: torch.Tensor, num_seqs: torch.Tensor
) -> torch.Tensor:
    """Returns the ``distribution`` of a step, on the device.

    vLLM knows how many sequences there are, and not how many of them decode. Those are
    the first ones with one new token each; the runner puts them first.

    Args:
        query_start_loc: i32[S + 1]; entries past the live sequences are arbitrary.
        num_seqs: i32[1].

    Returns:
        i32[3].
    """
    num_new = query_start_loc[1:] - query_start_loc[:-1]
    index = torch.arange(num_new.shape[0], device=num_new.device)
    decodes = ((num_new == 1) & (index < num_seqs)).to(torch.int32)
    num_decodes = torch.cumprod(decodes, 0).sum().reshape(1)
    return torch.cat([num_decodes, num_decodes, num_seqs]).to(torch.int32)
