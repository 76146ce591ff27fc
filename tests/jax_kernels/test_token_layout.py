"""The views of queries, new keys and values, and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention.token_layout import HeadRows, TokenRows

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
HEADS = [
    (heads, dtype)
    for heads in (1, 2, 4, 6, 8, 12, 24)
    for dtype in (BF16, F32)
    if heads > 1 or dtype == F32
]


def numbered(*shape: int) -> np.ndarray:
    """Every element its own number."""
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@pytest.mark.parametrize("lanes", [64, 128, 256, 384])
@pytest.mark.parametrize("heads, dtype", HEADS)
def test_word_rows_hold_the_lanes_of_the_heads_of_a_word(heads, dtype, lanes):
    layout = TokenRows(heads, lanes, dtype)
    x = numbered(3, heads, lanes)
    view = np.asarray(layout.view(jnp.asarray(x)))
    assert view.shape == layout.shape(3)
    assert layout.num_rows <= layout.buffer_rows <= layout.num_rows + 1
    assert layout.buffer_rows % 2 == 1
    for word in range(heads // layout.packing):
        of_word = x[:, word * layout.packing :][:, : layout.packing]
        for column in range(layout.columns):
            expected = of_word[..., column * 128 :][..., : layout.row_lanes]
            row = view[:, layout.row(word, column)]
            np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(layout.heads(jnp.asarray(view)), x)


@pytest.mark.parametrize("lanes", [128, 256])
def test_rows_of_traced_words_are_the_same(lanes):
    layout = TokenRows(16, lanes, BF16)
    for column in range(layout.columns):
        rows = jax.jit(lambda word, c=column: layout.row(word, c))(jnp.arange(8))
        assert rows.tolist() == [layout.row(word, column) for word in range(8)]


def test_the_heads_of_a_piece_follow_each_other_within_128_lanes():
    """The order in which XLA keeps them: pieces of 8 heads and 128 lanes."""
    layout = TokenRows(16, 256, BF16)
    assert layout.words_per_piece == 4
    assert [layout.row(word, 0) for word in range(8)] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert [layout.row(word, 1) for word in range(8)] == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize("lanes, size", [(64, 2), (128, 2), (256, 8), (384, 8)])
@pytest.mark.parametrize("num_tokens", [16, 13])
def test_pieces_hold_the_tokens_of_a_head(num_tokens, lanes, size):
    layout = HeadRows(3, lanes, BF16)
    assert layout.tokens_per_piece == size
    x = numbered(num_tokens, 3, lanes)
    view = np.asarray(layout.view(jnp.asarray(x)))
    for token in range(num_tokens):
        piece, place = divmod(token, size)
        of_token = view[:, piece, :, place // 2, place % 2]
        np.testing.assert_array_equal(of_token.reshape(3, lanes), x[token])


@pytest.mark.parametrize("lanes", [128, 256])
@pytest.mark.parametrize("num_tokens", [1, 16, 40])
def test_buffers_have_room_from_any_token_of_a_piece_on(num_tokens, lanes):
    layout = HeadRows(1, lanes, BF16)
    heads, columns, pieces, *_ = layout.buffer_shape(num_tokens)
    assert (heads, columns) == (1, lanes // 128)
    most = layout.tokens_per_piece - 1 + num_tokens
    assert (pieces - 1) * layout.tokens_per_piece < most
    assert most <= pieces * layout.tokens_per_piece
