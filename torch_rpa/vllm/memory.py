"""How large pages are, and how much memory they take in the words of vLLM."""

from __future__ import annotations

from jax_kernels.contract import cache

# What the shipped block sizes are tuned for, and the least that is worth a copy.
_PAGE_SIZE = 128
_SHORTEST_PAGE = 16
_PAGES_OF_A_SEQUENCE = 16
# Half of the memory for scalars of a core, 1 MiB, in entries of the page table.
_TABLE_ENTRIES = 2**20 // 2 // 4


def stored_head_dim(head_dim: int) -> int:
    """Returns the head_dim whose pages have as many bytes as those of the cache.

    vLLM takes ``2 * page_size * Hkv * head_dim`` elements for a page. The cache stores
    a key beside its value in 128 lanes up to 64, and pads each to 128 lanes beyond. The
    shape of the cache is the same for both numbers.
    """
    if cache.is_fused(head_dim):
        return cache.FUSED_VALUE_LANE
    return cache.align_to(head_dim, cache.LANES)


def without_padding(available: int, head_dim: int) -> int:
    """Returns bytes for the cache, of which vLLM has taken off those for padding.

    Its worker takes them off since its own pages do not count them. Pages here do.

    Args:
        available: Bytes that vLLM would give the cache.
        head_dim: That of the model.
    """
    return available * cache.align_to(head_dim, cache.LANES) // head_dim


def choose_page_size(max_model_len: int, max_num_seqs: int) -> int:
    """Returns tokens per page, a power of two.

    As many as the shipped block sizes are tuned for, fewer where sequences are so short
    that most of a page would be empty, and more where the page table of all sequences
    would take more than half of the memory for scalars.

    Args:
        max_model_len: Tokens of the longest sequence.
        max_num_seqs: Sequences of a step.
    """
    short = (1 << (max_model_len - 1).bit_length()) // _PAGES_OF_A_SEQUENCE
    size = min(max(short, _SHORTEST_PAGE), _PAGE_SIZE)
    entries = _TABLE_ENTRIES // max_num_seqs
    while size * entries < max_model_len and size < cache.MAX_PAGE_SIZE:
        size *= 2
    return size
