"""Pages that a sliding window has left are given back, and nothing else changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduling.test_scheduler import complete, scheduler_of, step
from tests.serving.page_audit import PageAudit
from torch_rpa.scheduling import Request
from torch_rpa.scheduling.request import NO_PAGE
from torch_rpa.scheduling.scheduler import pages_for


def first_seen_page(position, window, page_size):
    """The page of the first token that a query at a position sees."""
    return max(position - window + 1, 0) // page_size


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("window", [1, 4, 6, 7, 100])
def test_a_request_holds_the_pages_of_its_window_alone(window, prefix_caching):
    keywords = {"window": window, "prefix_caching": prefix_caching}
    scheduler, (request,) = scheduler_of(22, budget=8, new=12, **keywords)
    while rows := scheduler.schedule():
        (row,) = rows
        first = first_seen_page(row.start, window, page_size=4)
        assert request.num_left == first
        assert request.pages[:first] == [NO_PAGE] * first
        assert len(request.pages) >= pages_for(row.end, 4)
        assert scheduler.allocator.num_held == len(request.pages) - first
        complete(scheduler, rows)
    assert request.num_generated == 12 and scheduler.allocator.num_held == 0


def test_the_table_of_pages_names_a_page_for_every_position():
    """What stands for a page that was left may be read, so the request must hold it."""
    scheduler, (request,) = scheduler_of(22, window=6, new=3)
    complete(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert request.num_left == 4
    held = request.held_pages
    assert request.page_table() == [held[0]] * 4 + held


def test_pages_that_a_window_has_left_let_the_next_request_start():
    keywords = {"num_pages": 6, "prefix_caching": False, "new": 1}
    for window, starts in ((None, False), (6, True)):
        scheduler, requests = scheduler_of(20, 8, budget=16, window=window, **keywords)
        assert step(scheduler, requests) == [(0, 16)]
        # The first has 5 pages of 6. Its window has left 2, since a query at 16 sees
        # the tokens from 11 on.
        expected = [(0, 4), (1, 8)] if starts else [(0, 4)]
        assert step(scheduler, requests) == expected


def test_what_a_window_has_left_is_found_as_a_prefix():
    scheduler, requests = scheduler_of(20, window=6, new=9)
    assert step(scheduler, requests) == [(0, 20)]
    assert step(scheduler, requests) == [(0, 1)]
    assert requests[0].num_left == 3
    requests.append(Request([0] * 20, 9))
    scheduler.add(requests[1])
    assert step(scheduler, requests) == [(0, 1), (1, 4)]
    assert requests[1].num_shared == 16
    # It took up all four pages, also the three whose only use is to be found ...
    assert NO_PAGE not in requests[1].pages
    assert step(scheduler, requests) == [(0, 1), (1, 1)]
    assert requests[1].num_left == 3  # ... and leaves them as the first one did.
    assert requests[0].num_left == 4
    assert scheduler.allocator.num_holders(requests[1].pages[3]) == 1


def test_a_page_is_left_when_others_can_find_it_and_not_before():
    """Its last token is not known while the step that generates it runs."""
    scheduler, (request,) = scheduler_of(3, window=1, new=9)
    scheduler.schedule()
    scheduler.schedule()  # computes position 3, the end of the first page
    scheduler.schedule()
    assert request.num_cached == 5 and request.num_left == 0
    request.append(99)
    scheduler.schedule()
    assert request.num_left == 1
    (key,) = request.page_keys(4)
    assert scheduler.allocator.lookup(key) is not None


def test_without_prefixes_a_page_is_left_at_once():
    scheduler, (request,) = scheduler_of(3, window=1, new=9, prefix_caching=False)
    for _ in range(3):
        scheduler.schedule()
    assert request.num_cached == 5 and request.num_left == 1


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_request_that_is_preempted_after_it_left_pages_begins_anew(prefix_caching):
    keywords = {"num_pages": 7, "prefix_caching": prefix_caching, "window": 13}
    scheduler, requests = scheduler_of(1, 1, 20, budget=32, new=8, **keywords)
    PageAudit(scheduler)
    victim = requests[2]
    assert step(scheduler, requests) == [(0, 1), (1, 1), (2, 20)]
    for _ in range(3):
        assert step(scheduler, requests) == [(0, 1), (1, 1), (2, 1)]
    assert victim.num_left == 2
    assert step(scheduler, requests) == [(0, 1), (1, 1)]
    # The second one needed a page for its position 4.
    assert victim.num_preemptions == 1 and victim.num_cached == 0
    assert victim.pages == [] and victim.num_left == 0
    while scheduler.running or scheduler.waiting:
        assert step(scheduler, requests)
    assert victim.num_generated == 8 and victim.num_preemptions == 1
    assert scheduler.allocator.num_held == 0


@given(data=st.data())
def test_random_runs_read_nothing_that_was_given_back(data):
    page_size = data.draw(st.sampled_from([1, 4, 8]))
    window = data.draw(st.integers(1, 20))
    new = data.draw(st.integers(1, 12))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    enough = pages_for(max(lengths) + new - 1, page_size)
    slots = data.draw(st.integers(1, 5))
    scheduler, requests = scheduler_of(
        *lengths,
        num_pages=data.draw(st.integers(enough, 2 * enough)),
        page_size=page_size,
        budget=data.draw(st.integers(slots, 30)),
        slots=slots,
        new=new,
        prefix_caching=data.draw(st.booleans()),
        lookahead=data.draw(st.booleans()),
        window=window,
    )
    for length in lengths[:2]:  # the same beginnings once more
        requests.append(Request([0] * length, new))
        scheduler.add(requests[-1])
    PageAudit(scheduler)
    flight, num_steps = [], 0
    while scheduler.running or scheduler.waiting:
        rows = scheduler.schedule()
        assert rows or flight  # somebody always gets on
        for row in rows:
            first = first_seen_page(row.start, window, page_size)
            assert row.request.num_left <= first
            if not scheduler.prefix_caching:
                assert row.request.num_left == first
        waits = [] if scheduler.lookahead else rows
        complete(scheduler, flight + waits)
        flight = [] if waits else rows
        num_steps += 1
        assert num_steps < 2000
    assert all(request.num_generated == new for request in requests)
    assert scheduler.allocator.num_held == 0
