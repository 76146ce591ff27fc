"""Every token is computed once, in order; decode comes first, and all requests end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.scheduling import OutOfPagesError, PageAllocator, Request, Scheduler
from torch_rpa.scheduling.scheduler import pages_for


def scheduler_of(
    *lengths, num_pages=100, page_size=4, budget=64, slots=8, new=5, **keywords
):
    """A scheduler with requests whose prompts have nothing in common."""
    scheduler = Scheduler(
        PageAllocator(num_pages),
        page_size=page_size,
        max_num_sequences=slots,
        max_tokens_per_step=budget,
        **keywords,
    )
    requests = [Request([i] * length, new) for i, length in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def step(scheduler, requests, token=99):
    """Plans a step and completes it at once; returns (request, tokens) of each row."""
    rows = scheduler.schedule()
    sizes = [(requests.index(row.request), row.num_tokens) for row in rows]
    complete(scheduler, rows, token)
    return sizes


def complete(scheduler, rows, token=99):
    for row in rows:
        if row.is_last and (
            row.request in scheduler.running or row.request in scheduler.waiting
        ):
            row.request.append(token)
            if row.request.num_generated == row.request.max_new_tokens:
                scheduler.end(row.request)


def test_the_example_of_the_docstring():
    scheduler, requests = scheduler_of(5, 1, 9, budget=8)
    assert step(scheduler, requests) == [(1, 1), (0, 5), (2, 2)]
    assert step(scheduler, requests) == [(0, 1), (1, 1), (2, 6)]
    assert step(scheduler, requests) == [(0, 1), (1, 1), (2, 1)]
    assert [request.num_generated for request in requests] == [3, 3, 1]


def test_one_mixed_step_then_decode_steps():
    scheduler, requests = scheduler_of(3, 1, 4, new=3)
    assert step(scheduler, requests) == [(1, 1), (0, 3), (2, 4)]
    assert step(scheduler, requests) == [(0, 1), (1, 1), (2, 1)]
    assert step(scheduler, requests) == [(0, 1), (1, 1), (2, 1)]
    assert step(scheduler, requests) == []


def test_decodes_come_before_a_prompt_that_began_earlier():
    scheduler, requests = scheduler_of(20, 2, budget=6, slots=2)
    assert step(scheduler, requests) == [(0, 6)]
    requests.append(Request([7], 5))
    scheduler.running.insert(0, requests[-1])  # as if it had begun before
    requests[-1].pages = scheduler.allocator.allocate(1)
    assert step(scheduler, requests) == [(2, 1), (0, 5)]


def test_no_more_requests_run_than_there_are_slots():
    scheduler, requests = scheduler_of(2, 2, 2, slots=2, new=2)
    assert step(scheduler, requests) == [(0, 2), (1, 2)]
    assert step(scheduler, requests) == [(0, 1), (1, 1)]
    assert step(scheduler, requests) == [(2, 2)]


def test_a_later_request_does_not_overtake_one_that_has_no_room():
    scheduler, requests = scheduler_of(8, 16, 1, num_pages=5, new=4)
    assert step(scheduler, requests) == [(0, 8)]
    assert list(scheduler.waiting) == requests[1:]


def test_lookahead_plans_for_a_token_that_is_not_known():
    scheduler, (request,) = scheduler_of(3, new=3)
    first = scheduler.schedule()
    assert [(row.is_last, row.pending_row) for row in first] == [(True, None)]
    for start in (3, 4):
        (row,) = scheduler.schedule()
        assert (row.start, row.num_tokens, row.pending_row) == (start, 1, 0)
        request.append(99)
    assert scheduler.schedule() == []  # the third token is the last
    request.append(99)
    assert (request.num_generated, request.num_pending) == (3, 0)


def test_without_lookahead_a_pending_token_is_waited_for():
    scheduler, (request,) = scheduler_of(3, lookahead=False)
    assert len(scheduler.schedule()) == 1
    assert scheduler.schedule() == []
    request.append(99)
    assert [(row.start, row.pending_row) for row in scheduler.schedule()] == [(3, None)]


def test_decoding_takes_pages_from_the_request_that_started_last():
    scheduler, requests = scheduler_of(4, 4, 4, num_pages=4)
    assert step(scheduler, requests) == [(0, 4), (1, 4), (2, 4)]
    # The first takes the free page, the second that of the third.
    assert step(scheduler, requests) == [(0, 1), (1, 1)]
    assert list(scheduler.waiting) == [requests[2]] and requests[2].pages == []
    assert scheduler.num_preemptions == requests[2].num_preemptions == 1
    requests.append(Request([9], 5))
    scheduler.add(requests[-1])
    while (rows := step(scheduler, requests)) == [(0, 1), (1, 1)]:
        assert list(scheduler.waiting) == requests[2:]
    assert rows == [(3, 1), (2, 5)]  # its generated token is computed again as well


def test_a_request_that_can_never_fit_is_refused():
    scheduler, _ = scheduler_of(num_pages=3)
    scheduler.add(Request([1] * 8, 5))  # the last token is never cached
    with pytest.raises(OutOfPagesError, match="need 4 pages, got 3 in all: raise"):
        scheduler.add(Request([1] * 8, 6))


def test_equal_beginnings_share_full_pages_but_never_the_last_token():
    scheduler, requests = scheduler_of(1)
    for tokens in ([5] * 8, [5] * 8, [5] * 9, [5] * 3 + [6] * 6):
        requests.append(Request(tokens, 5))
    scheduler.add(requests[1])
    assert step(scheduler, requests) == [(0, 1), (1, 8)]
    for request in requests[2:]:
        scheduler.add(request)
    assert step(scheduler, requests) == [(0, 1), (1, 1), (3, 1), (2, 4), (4, 9)]
    first, same, longer, _ = requests[1:]
    assert same.pages[0] == longer.pages[0] == first.pages[0]
    assert longer.pages[1] == first.pages[1] != same.pages[1]
    assert [request.num_shared for request in requests] == [0, 0, 4, 8, 0]


def test_a_preempted_or_ended_request_leaves_its_pages_to_the_next():
    scheduler, requests = scheduler_of(8, new=1)
    assert step(scheduler, requests) == [(0, 8)]
    assert scheduler.allocator.num_held == 0
    requests.append(Request([0] * 8 + [1], 1))
    scheduler.add(requests[-1])
    assert step(scheduler, requests) == [(1, 1)]


def test_without_prefix_caching_nothing_is_shared():
    scheduler, requests = scheduler_of(8, new=1, prefix_caching=False)
    step(scheduler, requests)
    requests.append(Request([0] * 9, 1))
    scheduler.add(requests[-1])
    assert step(scheduler, requests) == [(1, 9)]


def test_ending_a_waiting_request_removes_it():
    scheduler, requests = scheduler_of(2, 2, slots=1)
    step(scheduler, requests)
    scheduler.end(requests[1])
    assert not scheduler.waiting
    scheduler.end(requests[0])
    assert scheduler.schedule() == [] and scheduler.allocator.num_held == 0


@given(data=st.data())
def test_random_runs_compute_every_token_once_and_end(data):
    page_size = data.draw(st.sampled_from([1, 4, 8]))
    new = data.draw(st.integers(1, 10))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    enough = pages_for(max(lengths) + new - 1, page_size)
    slots = data.draw(st.integers(1, 6))
    scheduler, requests = scheduler_of(
        *lengths,
        num_pages=data.draw(st.integers(enough, 2 * enough)),
        page_size=page_size,
        budget=data.draw(st.integers(slots, 40)),
        slots=slots,
        new=new,
        prefix_caching=data.draw(st.booleans()),
        lookahead=data.draw(st.booleans()),
    )
    cached = {request: 0 for request in requests}
    flight, num_steps = [], 0
    while scheduler.running or scheduler.waiting:
        rows = scheduler.schedule()
        assert rows or flight  # somebody always gets on
        assert sum(row.num_tokens for row in rows) <= scheduler.max_tokens_per_step
        for row in rows:
            request = row.request
            if row.start != cached[request]:  # preempted: computed or shared again
                assert request.num_preemptions and row.start == request.num_shared
            cached[request] = row.end
            assert len(request.pages) >= pages_for(row.end, page_size)
        waits = [] if scheduler.lookahead else rows
        complete(scheduler, flight + waits)
        flight = [] if waits else rows
        num_steps += 1
        assert num_steps < 2000
    assert all(request.num_generated == new for request in requests)
    assert scheduler.allocator.num_held == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"slots": 0}, "max_num_sequences must be at least 1, got 0"),
        ({"slots": 2, "budget": 1}, "each of the 2 sequences, got 1"),
    ],
)
def test_impossible_sizes_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        scheduler_of(**keywords)


def test_after_a_restart_everything_is_computed_again():
    scheduler, requests = scheduler_of(6, 9, 2, budget=12)
    assert step(scheduler, requests) == [(0, 6), (1, 6)]
    rows = scheduler.schedule()  # planned, and never run
    assert [row.num_tokens for row in rows] == [1, 3, 2]
    scheduler.allocator.allocate(3)  # by a call that raised before it was done
    scheduler.restart(requests)
    assert scheduler.allocator.num_free == scheduler.allocator.num_pages
    assert step(scheduler, requests) == [(0, 7), (1, 5)]  # no prefix is left
    assert [request.num_preemptions for request in requests] == [1, 1, 1]
    assert scheduler.num_preemptions == 3


def test_a_request_whose_preemption_was_interrupted_can_be_ended(monkeypatch):
    scheduler, requests = scheduler_of(2, 3)
    step(scheduler, requests)

    def fail(pages):
        raise RuntimeError("free")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.allocator, "free", fail)
        with pytest.raises(RuntimeError, match="free"):
            scheduler.change_model(b"other")
    scheduler.end(requests[1])
    scheduler.restart(requests[:1])
    assert step(scheduler, requests) == [(0, 3)]


def test_only_those_that_may_start_do():
    scheduler, requests = scheduler_of(2, 3, 4, new=2)
    among = {requests[1]}
    rows = scheduler.schedule(among)
    assert [row.request for row in rows] == [requests[1]]
    assert list(scheduler.waiting) == [requests[0], requests[2]]
    complete(scheduler, rows)
    assert step(scheduler, requests) == [(1, 1), (0, 2), (2, 4)]
