"""New keys and values in VMEM: which of them share words, and how they are loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention.config import AttentionSpec, KernelConfig
from jax_kernels.ragged_paged_attention.kernel import new_tokens
from jax_kernels.ragged_paged_attention.layout import CacheLayout
from jax_kernels.ragged_paged_attention.token_layout import HeadRows

ORIGIN, NUM_TOKENS = 6, 16


def make_config(num_kv_heads, q_dtype, head_dim) -> KernelConfig:
    return KernelConfig(
        spec=AttentionSpec(),
        cache=CacheLayout(1, 16, num_kv_heads, head_dim, "bfloat16"),
        phases=(),
        num_tokens=64,
        pages_per_sequence=1,
        num_q_heads=2 * num_kv_heads,
        q_dtype=jnp.dtype(q_dtype),
        out_dtype=jnp.dtype(q_dtype),
        interpret=True,
    )


class Slot:
    """Stands in for a Pallas reference that is indexed before it is read."""

    def __init__(self, value):
        self.value = value
        self.shape, self.dtype = value.shape, value.dtype

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self.value if index is ... else Slot(self.value[index])


def lay_out(tokens: np.ndarray, origin: int, config: KernelConfig) -> np.ndarray:
    """A slot of the ring with consecutive tokens; tokens of nobody are NaN.

    Args:
      tokens: [NUM_TOKENS, Hkv, D]
      origin: Number in the flat arrays of the first one.
      config: Gives the layout.
    """
    ring = new_tokens.ring_shape(config, 1, NUM_TOKENS)
    slot = np.full(ring.shape[1:], np.nan, ring.dtype)
    layout = config.new_token_layout
    if isinstance(layout, HeadRows):
        before = [(origin % layout.tokens_per_piece, 0), (0, 0), (0, 0)]
        view = layout.view(jnp.pad(tokens, before)).swapaxes(1, 2)
        slot[:, :, : view.shape[2]] = view
        return slot
    slot[:, : layout.num_rows] = layout.view(jnp.asarray(tokens))
    return slot


@pytest.mark.parametrize(
    "num_kv_heads, q_dtype, share",
    [
        (1, "bfloat16", True),
        (3, "bfloat16", True),
        (2, "bfloat16", False),
        (1, "float32", False),
        (2, "float32", False),
    ],
)
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("origin", [ORIGIN, ORIGIN + 1])
@pytest.mark.parametrize("first, size", [(0, 16), (4, 8), (3, 4)])
def test_tokens_are_loaded_from_where_they_lie(
    num_kv_heads, q_dtype, share, head_dim, origin, first, size
):
    config = make_config(num_kv_heads, q_dtype, head_dim)
    assert config.tokens_share_words == share
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((NUM_TOKENS, num_kv_heads, head_dim))
    tokens = tokens.astype(config.q_dtype)
    slot = jnp.asarray(lay_out(tokens, origin, config))
    per_word = config.new_heads_per_word

    def load(slot, origin):
        several, one = [], []
        for group in range(num_kv_heads // per_word):
            where = Slot(slot), origin, first
            several += new_tokens.load_tokens(*where, size, group, config)
            one += new_tokens.load_token(*where, 8, group, config)
        return several, one

    several, one = jax.jit(load)(slot, jnp.int32(origin))
    assert len(several) == len(one) == num_kv_heads
    for head in range(num_kv_heads):
        expected = tokens[first : first + size, head].astype(np.float32)
        np.testing.assert_array_equal(several[head].astype(jnp.float32), expected)
        expected = np.broadcast_to(expected[:1], (8, head_dim))
        np.testing.assert_array_equal(one[head].astype(jnp.float32), expected)
