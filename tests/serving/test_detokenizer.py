"""Pieces of text add up to the text, and no character is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import Detokenizer


@given(st.text(max_size=12))
def test_bytes_add_up_to_the_text(text):
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == detokenizer.text == text


@pytest.mark.parametrize("letter", ["e", "\u00e9", "\u20ac", "\U0001f600"])
def test_a_character_comes_with_its_last_byte(letter):
    detokenizer = Detokenizer(ByteTokenizer())
    data = letter.encode()
    expected = [""] * (len(data) - 1) + [letter]
    assert [detokenizer.add(byte) for byte in data] == expected


def test_half_a_character_is_shown_at_the_end():
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.add(0x61), detokenizer.add(0xC3)] == ["a", ""]
    assert detokenizer.flush() == "\\xc3"


class Words:
    """A tokenizer that joins words, so that a first one has no space before it."""

    def __init__(self):
        vocabulary = {"\u2581a": 0, "\u2581b": 1, "c": 2}
        self._tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        self._tokenizer.decoder = decoders.Metaspace()

    def decode(self, token_ids, skip_special_tokens):
        return self._tokenizer.decode(token_ids)


def test_spaces_between_words_survive():
    detokenizer = Detokenizer(Words())
    assert [detokenizer.add(token) for token in (0, 1, 2, 0)] == ["a", " b", "c", " a"]


@pytest.fixture(scope="module")
def cleaning():
    """A tokenizer of words that takes spaces before punctuation away."""
    words = ("it", "do", "n", "'", "s", "t", "ve", "re", "m", ".", ",", "!", "?", "##y")
    vocabulary = {word: index for index, word in enumerate(("[UNK]", *words))}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=True
    )


def test_the_tokenizer_of_the_test_cleans_up(cleaning):
    tokens = cleaning.convert_tokens_to_ids(["it", "'", "s", ".", "n", "##y", "!"])
    assert cleaning.decode(tokens) == "it's. ny!"


@given(tokens=st.lists(st.integers(1, 14), max_size=12))
def test_cleaned_text_is_the_same_in_pieces(cleaning, tokens):
    detokenizer = Detokenizer(cleaning)
    pieces = [detokenizer.add(token) for token in tokens]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == detokenizer.text == cleaning.decode(tokens)
