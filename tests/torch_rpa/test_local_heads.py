"""One process for each device: local heads and a sum after the output projection.

That is the way under TorchTPU. Here the processes are two, on CPU tensors, with gloo.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import torch_rpa
from torch_rpa import spmd

TOKENS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, PROCESSES = 6, 8, 2, 64, 32, 2
BATCH = [torch.tensor(x).int() for x in ([6, 4], [1, 0], [0, 2, 6], [0, 0, 2])]


def tensors() -> list[torch.Tensor]:
    """Queries, keys, values, and the weight of the output projection."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    shapes.append((HEADS, HEAD_DIM, WIDTH))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attend(q, k, v, weight) -> torch.Tensor:
    """``[T, WIDTH]``: these heads' part of what an attention layer gives."""
    cache = torch_rpa.empty_kv_cache(
        2, 8, k.shape[1], HEAD_DIM, dtype=torch.float32, device=q.device
    )
    out = torch.ops.rpa.ragged_paged_attention(
        q, k, v, cache, *BATCH, sm_scale=HEAD_DIM**-0.5
    )
    return out.flatten(1) @ weight.flatten(0, 1)


def run_process(rank: int, rendezvous: str, results: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{rendezvous}", rank=rank, world_size=PROCESSES
    )
    q, k, v, weight = tensors()
    q, k, v = (t.chunk(PROCESSES, dim=1)[rank] for t in (q, k, v))
    total = attend(q, k, v, weight.chunk(PROCESSES, dim=0)[rank])
    dist.all_reduce(total)
    torch.save(total, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_local_heads_of_two_processes_sum_up_to_all_heads(tmp_path):
    arguments = (str(tmp_path / "rendezvous"), str(tmp_path))
    mp.spawn(run_process, arguments, nprocs=PROCESSES)
    expected = attend(*tensors())
    for rank in range(PROCESSES):
        total = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_sharding_in_one_process_names_this_way():
    q, k, v, _ = tensors()
    cache = torch_rpa.empty_kv_cache(2, 8, KV_HEADS, HEAD_DIM, dtype=torch.float32)
    mesh: Any = None
    with pytest.raises(NotImplementedError, match="one process for each device"):
        spmd.sharded_ragged_paged_attention(q, k, v, cache, *BATCH, mesh=mesh)
