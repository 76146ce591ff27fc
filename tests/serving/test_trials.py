"""Requests of a failed step run in halves until one of them fails alone."""

import pytest

from torch_rpa.scheduling import Request
from torch_rpa.serving.trials import Trials


def culprits_of(requests, guilty):
    """Runs groups until all are through; returns who failed alone, and all failures."""
    trials, unfinished, alone, num_failures = Trials(), set(requests), [], 1
    trials.split(requests)
    while trials.group is not None:
        group = trials.requests
        if not guilty.isdisjoint(group):
            num_failures += 1
            if len(group) == 1:
                alone += group
                unfinished -= set(group)
            else:
                trials.split(group)
                continue
        for request in unfinished.intersection(group):
            assert not trials.is_through(unfinished)
            request.tokens.append(7)
        assert trials.is_through(unfinished)
        trials.go_on()
    return alone, num_failures


@pytest.mark.parametrize("count", [2, 3, 8, 13])
@pytest.mark.parametrize("num_guilty", [0, 1, 2])
def test_every_culprit_and_nobody_else_fails_alone(count, num_guilty):
    requests = [Request([1], 5) for _ in range(count)]
    guilty = {requests[0], requests[-2]} if num_guilty == 2 else set()
    guilty = {requests[count // 2]} if num_guilty == 1 else guilty
    alone, num_failures = culprits_of(requests, guilty)
    assert set(alone) == guilty and len(alone) == len(guilty)
    assert num_failures <= 1 + num_guilty * count.bit_length()
    innocent = [request for request in requests if request not in guilty]
    assert {request.num_generated for request in innocent} == {1}


def test_a_group_whose_requests_have_ended_is_through():
    requests = [Request([1], 5) for _ in range(3)]
    trials = Trials()
    trials.split(requests)
    assert trials.requests == requests[:2]
    assert not trials.is_through({requests[1]})
    assert trials.is_through({requests[2]})
    assert trials.go_on() and trials.requests == requests[2:]
    trials.split([])
    assert trials.group is None and not trials.is_through(set(requests))
