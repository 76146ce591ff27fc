"""Every token is computed once, in order, in pages of its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.generate.page_allocator import OutOfPagesError, PageAllocator
from torch_rpa.generate.scheduler import Request, Scheduler, pages_for

EOS = 9


def scheduler_of(lengths, *, num_pages=100, page_size=4, budget=64, max_new_tokens=5):
    return Scheduler(
        [[1] * length for length in lengths],
        PageAllocator(num_pages),
        page_size=page_size,
        max_new_tokens=max_new_tokens,
        max_tokens_per_step=budget,
        eos_token_ids=[EOS],
    )


def step(scheduler, tokens=None):
    rows = scheduler.next_step()
    sizes = [(scheduler.requests.index(row.request), row.num_tokens) for row in rows]
    scheduler.complete(rows, tokens or [1] * len(rows))
    return sizes


def test_one_mixed_step_then_decode_steps():
    scheduler = scheduler_of([3, 1, 4], max_new_tokens=3)
    assert step(scheduler) == [(1, 1), (0, 3), (2, 4)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 1)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 1)]
    assert step(scheduler) == []


def test_long_prefills_are_cut_to_the_budget():
    # The example of the docstring of Scheduler.
    scheduler = scheduler_of([5, 1, 9], budget=8)
    assert step(scheduler) == [(1, 1), (0, 5), (2, 2)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 6)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 1)]
    assert [len(r.generated) for r in scheduler.requests] == [3, 3, 1]


def test_an_ended_request_frees_its_pages():
    scheduler = scheduler_of([4, 4], num_pages=10)
    step(scheduler)
    step(scheduler, [EOS, 1])
    assert scheduler.requests[0].generated == [1, EOS]
    assert scheduler.requests[0].pages == []
    assert scheduler.allocator.num_free == 10 - 2
    assert step(scheduler) == [(1, 1)]


def test_pages_of_an_ended_request_serve_another():
    # 3 pages of 4: both prompts take one, and only one of them can grow at a time.
    scheduler = scheduler_of([4, 4], num_pages=3, max_new_tokens=2)
    with pytest.raises(OutOfPagesError, match="--num-pages"):
        step(scheduler), step(scheduler)
    scheduler = scheduler_of([4, 4], num_pages=2, max_new_tokens=4)
    step(scheduler, [EOS, 1])
    assert step(scheduler) == [(1, 1)]
    assert sorted(scheduler.requests[1].pages) == [0, 1]


@given(data=st.data())
def test_random_runs_keep_every_invariant(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    page_size = data.draw(st.sampled_from([1, 4, 8]))
    max_new_tokens = data.draw(st.integers(1, 10))
    budget = data.draw(st.integers(len(lengths), 64))
    num_pages = sum(pages_for(n + max_new_tokens, page_size) for n in lengths)
    scheduler = scheduler_of(
        lengths,
        num_pages=num_pages,
        page_size=page_size,
        budget=budget,
        max_new_tokens=max_new_tokens,
    )
    computed = {request: 0 for request in scheduler.requests}
    while rows := scheduler.next_step():
        assert sum(row.num_tokens for row in rows) <= budget
        single = [row.request.num_waiting == 1 for row in rows]
        assert single == sorted(single, reverse=True)
        pages = [page for request in scheduler.requests for page in request.pages]
        assert len(pages) == len(set(pages)) == num_pages - scheduler.allocator.num_free
        for request, num_tokens in rows:
            assert request.num_cached == computed[request]
            computed[request] += num_tokens
            assert len(request.pages) == pages_for(computed[request], page_size)
        tokens = st.lists(
            st.sampled_from([1, 2, EOS]), min_size=len(rows), max_size=len(rows)
        )
        scheduler.complete(rows, data.draw(tokens))
    assert scheduler.allocator.num_free == num_pages
    for request, length in zip(scheduler.requests, lengths, strict=True):
        assert computed[request] == length + len(request.generated) - 1
        ended = len(request.generated) == max_new_tokens
        assert ended or request.generated[-1] == EOS
        assert EOS not in request.generated[:-1]


def test_a_request_waits_with_what_is_not_cached():
    request = Request([1, 2, 3], generated=[4], num_cached=3)
    assert request.tokens == [1, 2, 3, 4]
    assert request.num_waiting == 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lengths": [3, 0]}, "prompt 1 must have at least one token, got 0"),
        ({"lengths": [1, 1], "budget": 1}, "at least the 2 prompts, got 1"),
        ({"lengths": [1], "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_impossible_requests_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        scheduler_of(**keywords)
