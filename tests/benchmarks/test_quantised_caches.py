"""Agreement of tokens with caches of other dtypes."""

import dataclasses

import pytest
import torch

from benchmarks import quantised_caches
from benchmarks.quantised_caches import MARK, Agreement, Answers

ANSWERS = Answers(next_tokens=[[1, 2, 3], [4]], texts=[[5, 6], [7]])


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_agreement_counts_tokens_at_each_position_and_whole_texts():
    others = Answers(next_tokens=[[1, 0, 3], [0]], texts=[[5, 0], [7]])
    got = quantised_caches.agreement(ANSWERS, others)
    assert got == Agreement(same_tokens=2, tokens=4, same_texts=1, texts=2)
    assert str(got) == "50.0 % | 1 of 2"


def test_answers_to_other_pieces_are_no_agreement():
    shorter = dataclasses.replace(ANSWERS, next_tokens=[[1, 2], [4]])
    with pytest.raises(ValueError, match="zip"):
        quantised_caches.agreement(ANSWERS, shorter)


def test_pieces_are_spread_over_all_texts_and_begin_like_a_text():
    got = quantised_caches.pieces(["abcdef", "ghijk"], 3, 2)
    assert [bytes(piece[1:]) for piece in got] == [b"ab", b"ef", b"hi"]
    assert {piece[0] for piece in got} == {256}
    with pytest.raises(ValueError, match="at most 3 of 4 bytes, got 4"):
        quantised_caches.pieces(["abcdef", "ghijk"], 4, 4)


def test_int8_with_whole_numbers_says_something_else():
    prompts = quantised_caches.pieces(["Return the number of items. " * 8], 2, 64)

    def ask(**options):
        return quantised_caches.ask(prompts, 4, dtype=torch.float32, **options)

    expected = ask()
    assert [len(row) for row in expected.next_tokens] == [64, 64]
    assert [len(text) for text in expected.texts] == [4, 4]
    scales = {"k_scale": 1.0, "v_scale": 1.0}
    rounded = ask(cache_dtype=torch.int8, **scales)
    got = quantised_caches.agreement(rounded, expected)
    assert 0 < got.same_tokens < got.tokens == 128


@pytest.mark.slow
def test_the_table_is_written_to_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARK}\n{MARK}\nafter\n")
    arguments = "--pieces 2 --bytes 16 --new 2 --update".split()
    assert quantised_caches.main([*arguments, str(page)]) == 0
    lines = page.read_text().splitlines()
    assert any("2 pieces of 16 bytes, 2 tokens written after each." in x for x in lines)
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    names = [row[0].removeprefix("| ") for row in rows[1:]]
    dtypes = ["float8_e4m3fn", "float8_e5m2", "int8"]
    assert names == [*(d for d in dtypes for _ in range(4)), "the model in float32"]
    assert {row[1] for row in rows[1:-1]} == {"model", "layer", "head", "1"}
    assert "\n".join(lines[-6:-4]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pieces", "0"], "--pieces: expected 1 to 256, got 0"),
        (["--bytes", "1"], "--bytes: expected 2 to 256, got 1"),
        (["--update", "no/such/page.md"], "--update: no/such/page.md"),
    ],
)
def test_mistakes_end_it_before_it_runs(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        quantised_caches.main(arguments)
    assert message in capsys.readouterr().err
