"""Text survives the byte tokenizer."""

from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.generate.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


@given(st.text())
def test_decode_undoes_encode(text):
    tokens = TOKENIZER.encode(text)
    assert all(0 <= token < TOKENIZER.vocab_size for token in tokens)
    assert TOKENIZER.decode(tokens) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_tokens_decode(tokens):
    assert isinstance(TOKENIZER.decode(tokens), str)


def test_special_tokens_are_shown_on_request():
    tokens = [*TOKENIZER.encode("h\u00e9"), TOKENIZER.eos_token_id]
    assert tokens == [256, 0x68, 0xC3, 0xA9, 257]
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == "<bos>h\u00e9<eos>"


def test_bytes_that_are_no_text_are_escaped():
    assert TOKENIZER.decode([0xFF, 0x41]) == "\\xffA"
