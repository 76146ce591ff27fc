"""The list of shapes."""

import pytest

from benchmarks import cases
from benchmarks.tpu_timing import workloads


def test_a_name_means_one_case_in_all_tables():
    for table in cases.TABLES.values():
        assert len({case.name for case in table}) == len(table)
        assert all(cases.BY_NAME[case.name] == case for case in table)


def test_select_names_what_is_close_and_where_all_names_are():
    where = rf"one of {len(cases.BY_NAME)} names that python -m benchmarks.predict --li"
    with pytest.raises(ValueError, match=where + "st prints; got 'nothing'"):
        cases.select(["nothing"])
    with pytest.raises(ValueError, match=where) as caught:
        cases.select(["llama-decode-8x1k", "lama-decode-128x1k"])
    message = str(caught.value)
    assert "such as llama-decode-128x1k, " in message
    assert message.endswith("; got 'lama-decode-128x1k'") and len(message) < 300


def test_decode_contexts_share_a_program():
    names = ["llama-decode-128x512", "llama-decode-128x16k", "llama-decode-8x1k"]
    assert len({case.shape for case in cases.select(names)}) == 1


def test_lengths_must_fit_the_program():
    with pytest.raises(ValueError, match=r"num_tokens: expected at least 2, got 1"):
        cases.fitted("x", cases.MQA, "2*1/8", num_tokens=1)
    with pytest.raises(ValueError, match=r"pages_per_sequence: .* 2, got 1"):
        cases.fitted("x", cases.MQA, "1/9", page_size=8, pages_per_sequence=1)


def test_a_window_counts_visible_tokens_only():
    near, far = cases.select(["gpt-oss-decode-128x1k", "gpt-oss-decode-128x8k"])
    assert near.ideal.bytes == far.ideal.bytes
    assert near.ideal.flops == far.ideal.flops


def test_mixed_parts_add_up_to_the_mixed_step():
    names = ["64x2k-2k-at-8k", "only-64x2k", "only-2k-at-8k"]
    whole, decodes, chunk = cases.select([f"llama-mixed-{name}" for name in names])
    assert whole.shape == decodes.shape == chunk.shape
    assert whole.ideal.bytes == decodes.ideal.bytes + chunk.ideal.bytes
    assert whole.ideal.flops == decodes.ideal.flops + chunk.ideal.flops


def test_names_in_short_keep_a_program_on_one_line():
    names = cases.names_in_short(cases.select(["llama:8*1/512", "llama:8*1/1024"]))
    assert names == ["llama:LENGTHS, 2 such as 8*1/512"]
    assert cases.names_in_short(cases.MAIN) == [case.name for case in cases.MAIN]


def test_drawn_lengths_are_always_the_same():
    sequences = {
        name: workloads.parse_sequences(lengths)
        for name, lengths in cases.DRAWN.items()
    }
    totals = {name: sum(s.kv_len for s in drawn) for name, drawn in sequences.items()}
    assert totals == {
        "dec256": 1_965_144,
        "64dec": 488_957,
        "fresh16": 14_272,
        "spec64x4": 316_885,
    }
    assert [len(drawn) for drawn in sequences.values()] == [256, 64, 16, 64]
    assert {s.q_len for s in sequences["spec64x4"]} == {4}
    assert all(s.q_len == s.kv_len for s in sequences["fresh16"])


def test_deployments_share_programs():
    """Each program is a compilation: as few as there are shapes of servers."""
    shapes = cases.by_shape(cases.DEPLOYMENTS)
    assert len(shapes) < len(cases.DEPLOYMENTS) * 0.6
    names = {case.name for case in shapes[cases.BY_NAME["deploy-8x1-dec256"].shape]}
    assert names == {"deploy-8x1-dec256", "deploy-8x1-64dec", "deploy-8x1-256x300"}


def test_many_lengths_are_shortened_in_text():
    assert cases.shortened("64*1/2048,2048/8192") == "64*1/2048,2048/8192"
    assert cases.shortened("1/1,1/2,1/3", parts=3) == "1/1,1/2,1/3"
    assert cases.shortened("1/1,1/2,1/3,1/4", parts=2) == "1/1,1/2 and 2 more"
