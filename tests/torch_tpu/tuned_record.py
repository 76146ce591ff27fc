"""A tuned record for the shape of ``make_call`` in bfloat16, with 64 pages."""

from jax_kernels.tuned import TunedBlocks, TunedShape


def tuned_record(chip: str = "v6e") -> TunedBlocks:
    """Blocks of decode that the cost model does not choose."""
    blocks = {"decode_block_kv": 32}
    return TunedBlocks(
        chip=chip,
        phase="decode",
        shape=TunedShape("bfloat16", "bfloat16", 4, 2, 128, 8),
        blocks=blocks,
        default_blocks=blocks,
        kind="prediction",
        cycles={"step": 1},
        default_cycles={"step": 1},
        versions={},
    )
