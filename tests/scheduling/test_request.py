"""Keys of pages stand for all tokens up to their end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.scheduling import Request

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(one=TOKENS, other=TOKENS, page_size=st.integers(1, 4))
def test_keys_are_equal_exactly_if_all_tokens_before_are(one, other, page_size):
    keys, other_keys = (Request(t, 1).page_keys(page_size) for t in (one, other))
    assert len(keys) == len(one) // page_size
    for page, (key, other_key) in enumerate(zip(keys, other_keys, strict=False)):
        end = (page + 1) * page_size
        assert (key == other_key) == (one[:end] == other[:end])


@given(tokens=TOKENS, more=TOKENS, page_size=st.integers(1, 4))
def test_keys_grow_with_the_tokens(tokens, more, page_size):
    request = Request(list(tokens), 100)
    request.page_keys(page_size)
    request.num_pending = len(more)
    for token in more:
        request.append(token)
    assert request.page_keys(page_size) == Request(tokens + more, 1).page_keys(
        page_size
    )


def test_a_pending_token_counts_but_is_not_known():
    request = Request([1, 2, 3], 5, num_cached=3)
    assert (request.num_uncached, request.num_generated) == (0, 0)
    request.num_pending = 1
    assert (request.num_uncached, request.num_generated) == (1, 0)
    assert request.generated == []
    request.append(7)
    assert request.num_pending == 0
    assert (request.prompt, request.generated) == ([1, 2, 3], [7])
    assert (request.num_uncached, request.num_generated) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "prompt must have at least one token, got 0"),
        (([1], 0), "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request(*arguments)


def test_keys_depend_on_what_stands_before_the_first():
    request = Request([1, 2, 3, 4], 1)
    keys = list(request.page_keys(2))
    others = list(request.page_keys(2, b"another model"))
    assert len(keys) == len(others) == 2 and not set(keys) & set(others)
    assert request.page_keys(2) == keys
