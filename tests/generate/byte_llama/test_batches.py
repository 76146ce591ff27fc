"""Rows to train on start like prompts; evaluation takes every byte once."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from torch_rpa.generate.byte_llama.batches import (
    BOS,
    EOS,
    IGNORED,
    TrainingRows,
    evaluation_batches,
)
from torch_rpa.generate.byte_llama.corpus import Document

DOCUMENTS = [Document("a", "one\n\ntwo\n"), Document("b", "three\nfour\n")]
# The same end to end, and what may stand after the begin token of a row.
STREAM = [BOS, *b"one\n\ntwo\n", EOS, BOS, *b"three\nfour\n", EOS]


def test_rows_are_pieces_of_the_corpus_from_a_line_on():
    rows = TrainingRows(DOCUMENTS, 4).sample(200, seed=0)
    assert rows.shape == (200, 5) and rows.dtype == torch.int64
    assert (rows[:, 0] == BOS).all()
    # Of "four" there are four bytes and a line break; an end token starts no row.
    beginnings = {bytes(row) for row in rows[:, 1:].tolist() if max(row) < 256}
    assert beginnings == {b"one\n", b"two\n", b"thre", b"four"}
    pieces = {tuple(STREAM[start + 1 : start + 5]) for start in range(len(STREAM))}
    assert {tuple(row) for row in rows[:, 1:].tolist()} <= pieces


def test_rows_depend_on_the_seed_alone():
    rows = TrainingRows(DOCUMENTS, 4)
    assert torch.equal(rows.sample(50, seed=3), rows.sample(50, seed=3))
    assert not torch.equal(rows.sample(50, seed=3), rows.sample(50, seed=4))


def test_the_longest_possible_row_is_the_whole_corpus():
    rows = TrainingRows(DOCUMENTS, len(STREAM) - 1).sample(3, seed=0)
    assert rows.tolist() == [STREAM] * 3


def test_a_corpus_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match=f"more than the {len(STREAM)} tokens"):
        TrainingRows(DOCUMENTS, len(STREAM))


@hypothesis.given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=5),
    length=st.integers(1, 12),
    rows=st.integers(1, 4),
)
def test_evaluation_predicts_every_byte_once_from_those_before(texts, length, rows):
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    predicted = []
    for inputs, targets in evaluation_batches(documents, length, rows):
        assert inputs.shape == targets.shape
        assert inputs.shape[0] <= rows and inputs.shape[1] == length
        for seen, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            piece = [token for token in following if token != IGNORED]
            assert piece and following == piece + [IGNORED] * (length - len(piece))
            assert seen[: len(piece)] == [BOS, *piece[:-1]]
            predicted += piece
    assert predicted == [t for text in texts for t in (*text.encode("utf-8"), EOS)]
