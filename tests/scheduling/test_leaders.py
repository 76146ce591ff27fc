"""Several texts of one prompt: the first one computes it, and the others share it."""

from tests.scheduling.test_scheduler import complete, scheduler_of, step
from torch_rpa.scheduling import Request


def followers_of(leader, count, new=5):
    followers = [Request(list(leader.prompt), new) for _ in range(count)]
    for follower in followers:
        follower.leader = leader
    return followers


def scheduler_with_followers(length, count=1, **keywords):
    scheduler, requests = scheduler_of(length, **keywords)
    for follower in followers_of(requests[0], count):
        scheduler.add(follower)
        requests.append(follower)
    return scheduler, requests


def test_followers_wait_until_the_prompt_is_computed_and_share_its_pages():
    scheduler, requests = scheduler_with_followers(10, count=2, budget=6, slots=4)
    assert step(scheduler, requests) == [(0, 6)]
    assert step(scheduler, requests) == [(0, 4)]  # two tokens more would fit
    assert step(scheduler, requests) == [(0, 1), (1, 2), (2, 2)]
    leader, *followers = requests
    for follower in followers:
        assert follower.num_shared == 8
        assert follower.pages[:2] == leader.pages[:2]
        assert follower.pages[2] != leader.pages[2]
    shared = [scheduler.allocator.num_holders(page) for page in leader.pages]
    assert shared == [3, 3, 1]


def test_without_a_leader_equal_prompts_do_not_wait():
    scheduler, requests = scheduler_of(10, budget=32)
    requests.append(Request([0] * 10, 5))
    scheduler.add(requests[1])
    assert step(scheduler, requests) == [(0, 10), (1, 10)]


def test_who_comes_after_a_follower_that_waits_may_start():
    scheduler, requests = scheduler_with_followers(10, budget=12)
    requests.append(Request([7], 5))
    scheduler.add(requests[2])
    assert step(scheduler, requests) == [(2, 1), (0, 10)]
    assert list(scheduler.waiting) == [requests[1]]
    assert step(scheduler, requests) == [(0, 1), (2, 1), (1, 2)]


def test_without_prefixes_there_is_nothing_to_wait_for():
    scheduler, requests = scheduler_with_followers(10, budget=32, prefix_caching=False)
    assert step(scheduler, requests) == [(0, 10), (1, 10)]


def test_followers_of_a_leader_that_ended_compute_the_prompt():
    scheduler, requests = scheduler_with_followers(10, count=2, budget=6, slots=4)
    assert step(scheduler, requests) == [(0, 6)]
    scheduler.end(requests[0])
    # Of the six tokens, four are a page that stays behind.
    assert step(scheduler, requests) == [(1, 6)]
    assert requests[1].num_shared == 4
    scheduler.end(requests[1])
    assert step(scheduler, requests) == [(2, 2)]
    assert requests[2].num_shared == 8


def test_followers_of_a_leader_that_ended_while_it_waited_start():
    scheduler, requests = scheduler_with_followers(10, budget=32)
    scheduler.end(requests[0])
    assert step(scheduler, requests) == [(1, 10)]


def test_a_follower_waits_again_after_a_restart():
    scheduler, requests = scheduler_with_followers(10, budget=6, slots=4)
    for _ in range(3):
        step(scheduler, requests)
    assert len(scheduler.running) == 2
    scheduler.restart(requests)
    num_tokens = len(requests[0].tokens)
    assert step(scheduler, requests) == [(0, 6)]
    assert step(scheduler, requests) == [(0, num_tokens - 6)]
    assert step(scheduler, requests)[0] == (0, 1)
    assert requests[1].num_shared == 8


def test_a_leader_that_is_preempted_does_not_hold_up_its_followers():
    """The leader started later than another request, which takes its pages."""
    scheduler, requests = scheduler_of(8, 8, num_pages=5, budget=12, new=13)
    (follower,) = followers_of(requests[1], 1, new=13)
    assert step(scheduler, requests) == [(0, 8), (1, 4)]
    scheduler.add(follower)
    requests.append(follower)
    assert step(scheduler, requests) == [(0, 1), (1, 4)]
    while not requests[1].num_preemptions:
        step(scheduler, requests)
    assert scheduler.running == [requests[0]]
    while scheduler.running or scheduler.waiting:
        rows = scheduler.schedule()
        assert rows
        complete(scheduler, rows)
    assert [request.num_generated for request in requests] == [13] * 3
    assert scheduler.allocator.num_held == 0
