"""Batches and options that every implementation of the operator must get right."""

from tests.support.ragged_batches import make_ragged_batch

MIXED = [(1, 17), (1, 16), (1, 1), (7, 7), (5, 40), (16, 48)]

# name -> (sequences, arguments of make_ragged_batch, options of the operator)
SCENARIOS = {
    "mixed": (MIXED, {}, {}),
    "bf16": (MIXED, {"q_dtype": "bfloat16"}, {}),
    "decode only": ([(1, n) for n in (1, 2, 15, 16, 17, 33)], {}, {}),
    "prefill only": ([(n, n) for n in (1, 15, 16, 17)], {"head_dim": 128}, {}),
    "chunks": (
        [(1, 20), (4, 4), (4, 19), (3, 30)],
        {"distribution": (1, 3, 4)},
        {"chunk_prefill_size": 4},
    ),
    "few tokens each": (
        [(4, 20), (1, 17), (0, 9), (3, 3), (2, 30), (6, 40)],
        {"distribution": (5, 5, 6)},
        {"decode_q_len": 4},
    ),
    "nothing live": ([], {}, {}),
    "empty sequences": ([(1, 5), (0, 9), (0, 0), (4, 9)], {}, {}),
    "shared prefix": ([(1, 37), (5, 40)], {"shared_prefix_pages": 2}, {}),
    "window": (MIXED, {"head_dim": 96}, {"sliding_window": 6}),
    "full attention": (MIXED, {}, {"causal": False}),
    "causal blocks": (
        [(1, 17), (1, 16), (4, 20), (3, 33), (7, 7), (5, 40), (40, 72), (33, 60)],
        {"distribution": (4, 4, 8)},
        {"causal_block": 8, "decode_q_len": 4},
    ),
    "causal blocks of a window": (
        MIXED,
        {"head_dim": 96, "with_sinks": True},
        {"causal_block": 4, "sliding_window": 6, "return_lse": True},
    ),
    "new keys of causal blocks": (
        MIXED,
        {},
        {"attend": "new", "causal_block": 4, "return_lse": True},
    ),
    "soft cap": (MIXED, {}, {"soft_cap": 3.0, "sm_scale": 1.0}),
    "sinks": (MIXED, {"with_sinks": True, "num_q_heads": 6}, {}),
    "odd group": (MIXED, {"num_q_heads": 15, "num_kv_heads": 3}, {}),
    "float32 into bf16": (MIXED, {"cache_dtype": "bfloat16"}, {}),
    "fp8": (MIXED, {"cache_dtype": "float8_e4m3fn", "q_dtype": "bfloat16"}, {}),
    "fp8 scales": (
        MIXED,
        {"cache_dtype": "float8_e5m2", "head_dim": 128, "k_scale": 0.5, "v_scale": 2.0},
        {"k_scale": 0.5, "v_scale": 2.0},
    ),
    "int8 with quantised queries": (
        MIXED,
        {"cache_dtype": "int8", "k_scale": 0.03, "v_scale": 0.03},
        {"q_scale": 0.03, "k_scale": 0.03, "v_scale": 0.03},
    ),
    "lse": (MIXED, {"with_sinks": True}, {"return_lse": True}),
    "keys of the cache": (
        [(1, 1), *MIXED, (3, 3)],
        {"q_dtype": "bfloat16", "head_dim": 128, "distribution": (1, 1, 8)},
        {"attend": "cache", "return_lse": True, "sliding_window": 9},
    ),
    "keys of the cache, not causal": (
        [(1, 1), *MIXED],
        {"with_sinks": True},
        {"attend": "cache", "return_lse": True, "causal": False},
    ),
    "keys of the cache without slots for new ones": (
        [(1, 33), (1, 1), (50, 82), (40, 41), (3, 3)],
        {"with_sinks": True, "new_tokens_have_slots": False, "pages_per_sequence": 2},
        {"attend": "cache", "return_lse": True, "update_kv_cache": False},
    ),
    "new keys": (MIXED, {}, {"attend": "new", "return_lse": True}),
    "new keys of a window": (
        MIXED,
        {"cache_holds_new_tokens": True},
        {"attend": "new", "sliding_window": 5, "update_kv_cache": False},
    ),
    "read only": (MIXED, {"cache_holds_new_tokens": True}, {"update_kv_cache": False}),
}


def make_scenario(name):
    """Returns the batch, its options, and the options that the oracle knows."""
    sequences, arguments, options = SCENARIOS[name]
    batch = make_ragged_batch(sequences, **arguments)
    options = {"sm_scale": batch.queries.shape[2] ** -0.5} | options
    oracle_options = {
        name: value
        for name, value in options.items()
        if name not in ("chunk_prefill_size", "decode_q_len", "return_lse")
    }
    return batch, options, oracle_options
