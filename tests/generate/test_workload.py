"""Traces say who comes when, and requests come then."""

import dataclasses
from typing import Any

import pytest

from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.generate.trace import TRACE_FORMAT
from torch_rpa.generate.workload import (
    TimedRequest,
    Workload,
    read_trace,
    replay,
    trace_workload,
)
from torch_rpa.serving import SamplingParams

PARAMS = SamplingParams(max_new_tokens=7, eos_token_ids=(257,), seed=0)


def read(tmp_path, text):
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8")
    trace = read_trace(path, PARAMS)
    return trace_workload(trace, ByteTokenizer(), PARAMS, vocabulary=256)


def test_a_line_says_when_and_what_and_how(tmp_path):
    workload = read(
        tmp_path,
        '{"arrival": 2, "prompt": "b"}\n\n'
        '{"arrival": 1.5, "prompt": "a", "max_new_tokens": 3, "temperature": 0.5, '
        '"top_k": 4, "top_p": 0.9, "seed": 8}\n',
    )
    later, first = reversed(workload.requests)
    assert not workload.in_steps
    assert (first.name, first.arrival) == ("line 3", 1.5)
    assert first.prompt_ids == ByteTokenizer().encode("a")
    assert first.params == SamplingParams(
        3, temperature=0.5, top_k=4, top_p=0.9, seed=8, eos_token_ids=(257,)
    )
    assert (later.name, later.arrival, later.params) == ("line 1", 2.0, PARAMS)


def test_random_prompts_share_what_they_are_told_to_and_run_to_their_end(tmp_path):
    line = '{"arrival_step": 1, "prompt_tokens": %d, "prefix": "%s", '
    line += '"prefix_tokens": 5}\n'
    workload = read(tmp_path, line % (9, "p") + line % (8, "p") + line % (7, "q"))
    assert workload.in_steps
    one, two, other = (request.prompt_ids for request in workload.requests)
    assert list(map(len, (one, two, other))) == [9, 8, 7]
    assert one[:5] == two[:5] != other[:5]
    assert one[5:8] != two[5:]
    assert all(0 <= token < 256 for token in one + two + other)
    assert {request.params.eos_token_ids for request in workload.requests} == {()}
    again = read(tmp_path, line % (9, "p") + line % (8, "p") + line % (7, "q"))
    assert again == workload


def test_random_prompts_ask_for_nothing_that_ends_a_text(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 4}\n{"prompt": "a"}\n', encoding="utf-8")
    wishes = {"stop_strings": ("a",), "structured_outputs": {"regex": "a"}}
    params = dataclasses.replace(PARAMS, **wishes)
    trace = read_trace(path, params)
    workload = trace_workload(trace, ByteTokenizer(), params, vocabulary=256)
    random, text = (request.params for request in workload.requests)
    assert random == dataclasses.replace(PARAMS, eos_token_ids=())
    assert text == params


def test_the_example_in_the_help_is_a_trace(tmp_path):
    lines = [line for line in TRACE_FORMAT.splitlines() if line.startswith("  {")]
    workload = read(tmp_path, "\n".join(lines))
    assert [len(request.prompt_ids) for request in workload.requests] == [5, 300]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold at least one request"),
        ("[1]", "line 1: must be a JSON object"),
        ("{", "line 1: "),
        ('{"prompt": "a"}\n{"promt": "a"}', r"line 2: fields must be .* \['promt'\]"),
        ('{"arrival": 1}', "either prompt or prompt_tokens"),
        ('{"prompt": "a", "prompt_tokens": 1}', "either prompt or prompt_tokens"),
        (
            '{"prompt": "a", "arrival": -1}',
            "line 1: arrival must be a number",
        ),
        ('{"prompt_tokens": 1, "prefix_tokens": 2}', "at most prompt_tokens 1, got 2"),
        ('{"prompt": "a", "top_p": 2}', "line 1: top_p must be"),
        (
            '{"prompt": "a", "seed": "b"}',
            "line 1: seed must be an int or None",
        ),
        ('{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens must be an int"),
        ('{"prompt": 42}', "line 1: prompt must be a text, got 42"),
        ('{"prompt": ""}', "line 1: prompt must be a text, got ''"),
        ('{"prompt_tokens": "9"}', "line 1: prompt_tokens must be an int from 1"),
        ('{"prompt_tokens": 1e9}', "line 1: prompt_tokens must be an int from 1"),
        ('{"prompt_tokens": 2, "prefix": 1}', "line 1: prefix must be a name, got 1"),
        ('{"prompt": "a", "prefix": "b"}', "prefix must be left out beside prompt"),
        ('{"prompt": "a", "arrival": "0"}', "line 1: arrival must be a number"),
        ('{"prompt": "a", "arrival": NaN}', "line 1: arrival must be a number"),
        ('{"prompt": "a", "arrival": 1, "arrival_step": 1}', "line 1: .* got both"),
        (
            '{"prompt": "a", "arrival": 1}\n{"prompt": "a", "arrival_step": 1}',
            "line 2: all lines must have arrival, or all arrival_step",
        ),
    ],
)
def test_other_lines_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_every_bad_line_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [b'{"prompt": "a"}', b'{"prompt": 1}', b"", b"{", b'{"prompt": "\xff"}']
    path.write_bytes(b"\n".join([*lines, b'{"prompt": "b\xe2\x80\xa8c"}']))
    with pytest.raises(ValueError, match="prompt must be a text, got 1") as caught:
        read_trace(path, PARAMS)
    named = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert named == [f"{path}, line {number}" for number in (2, 4, 5)]


class Engine(Any):  # of the engine, only what replay calls
    """Ends each request with the third step after it was added."""

    def __init__(self):
        self.num_steps = 0
        self.added = []
        self.running = []

    @property
    def has_unfinished(self):
        return bool(self.running)

    def add_texts(self, prompt_ids, params):
        self.added.append((self.num_steps, prompt_ids))
        self.running.append(3)
        return [f"request {len(self.added)}"]

    def step(self):
        self.num_steps += 1
        self.running = [left - 1 for left in self.running if left > 1]
        return ["update"]


def workload_of(arrivals, in_steps):
    requests = [TimedRequest("", [i], PARAMS, a) for i, a in enumerate(arrivals)]
    return Workload(requests, in_steps)


def test_requests_arrive_after_their_number_of_steps():
    engine, names = Engine(), []
    workload = workload_of((0, 1, 1, 2, 40), in_steps=True)
    updates = list(replay(engine, workload, lambda name, request: names.append(name)))
    # Nothing is left to do after 5 steps: the last need not wait for step 40.
    assert engine.added == [(0, [0]), (1, [1]), (1, [2]), (2, [3]), (5, [4])]
    assert names == [f"request {index}" for index in range(1, 6)]
    assert updates == ["update"] * 8


def test_requests_arrive_after_their_number_of_seconds(monkeypatch):
    from torch_rpa.generate import workload

    clock, slept = [100.0], []

    class Time:
        @staticmethod
        def perf_counter():
            return clock[0]

        @staticmethod
        def sleep(seconds):
            slept.append(seconds)
            clock[0] += seconds

    class Engine2(Engine):
        def step(self):
            clock[0] += 1.0
            return super().step()

    monkeypatch.setattr(workload, "time", Time)
    engine = Engine2()
    arrivals = workload_of((0.0, 1.5, 9.0), in_steps=False)
    list(replay(engine, arrivals, lambda name, request: None))
    assert engine.added == [(0, [0]), (2, [1]), (5, [2])]
    assert slept == [4.0]
