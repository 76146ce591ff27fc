"""Notes in SMEM: the cells or steps in flight, and how much of them moves."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.kernel.refs import Bookkeeping, ScalarRefs
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, Lengths


def store(notes, slot: Int, value) -> None:
    """Notes the numbers of a cell or of a step, which are a tree, for a slot."""
    store_at(notes, slot * len(jax.tree.leaves(value)), value)


def store_at(notes, first: Int, value) -> None:
    """Notes the numbers of a tree from a place on."""
    for index, leaf in enumerate(jax.tree.leaves(value)):
        notes[first + index] = jnp.asarray(leaf, jnp.int32)


def load(notes, slot: Int, structure) -> Any:
    """What ``store`` has noted for a slot; ``structure`` is that of its tree."""
    size = structure.num_leaves
    return jax.tree.unflatten(
        structure, [notes[slot * size + index] for index in range(size)]
    )


def forget_writes(bookkeeping: Bookkeeping) -> None:
    """Notes that nothing is being written yet."""
    for counts in (bookkeeping.written_rows, bookkeeping.out_tokens):
        for slot in range(counts.shape[0]):
            counts[slot] = 0


def read_lengths(scalars: ScalarRefs, sequence: Int) -> Lengths:
    q_start = scalars.cu_q_lens[sequence]
    return Lengths(
        q_start=q_start,
        q_len=scalars.cu_q_lens[sequence + 1] - q_start,
        kv_len=scalars.kv_lens[sequence],
    )
