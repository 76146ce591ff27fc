"""What people hand to an engine: token ids of it, or an error that names it."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving.prompts import PromptReader

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each letter, with a begin token before a text."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {chr(code): len(vocabulary) + code for code in range(33, 123)}
    vocabulary = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def reader(tokenizer):
    return PromptReader(tokenizer, pad_token_id=0, others=(1, 2))


def ids_of(tokenizer, text):
    return [1, *tokenizer.convert_tokens_to_ids(list(text))]


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        np.array([5, 6, 7]),
        [np.int32(5), np.int64(6), 7],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]], dtype=torch.int32),
        list(torch.tensor([5, 6, 7])),
        [[5, 6, 7]],
        {"input_ids": [5, 6, 7]},
        {
            "input_ids": torch.tensor([[0, 0, 5, 6, 7]]),
            "attention_mask": [[0, 0, 1, 1, 1]],
        },
        BatchEncoding({"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}),
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 0]},
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_of_every_kind_are_a_prompt(reader, prompt):
    tokens = reader.read(prompt, "prompt_ids")
    assert tokens == [5, 6, 7] and {type(token) for token in tokens} == {int}


def test_texts_begin_with_one_begin_token(reader, tokenizer):
    assert reader.read("42", "p") == ids_of(tokenizer, "42")
    assert reader.read("<s>42", "p") == ids_of(tokenizer, "42")
    assert PromptReader(ByteTokenizer(), pad_token_id=None, others=()).read(
        "42", "p"
    ) == [256, 52, 50]


def test_chats_are_what_their_template_makes_of_them(reader, tokenizer):
    expected = ids_of(tokenizer, "user:ab>")
    assert reader.read(CHAT, "p") == expected
    assert reader.read(tokenizer.apply_chat_template(CHAT), "p") == expected[:-1]
    goes_on = [*CHAT, {"role": "assistant", "content": "c"}]
    assert reader.read(goes_on, "p") == ids_of(tokenizer, "user:ab;assistant:c")
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text"}]}]
    with pytest.raises(NotImplementedError, match=r"p must be text only.*'image'"):
        reader.read(parts, "p")


def test_batches_of_every_kind_are_lists_of_prompts(reader, tokenizer):
    expected = [ids_of(tokenizer, "ab"), ids_of(tokenizer, "cde")]
    padded = tokenizer(["ab", "cde"], padding=True, return_tensors="pt")
    assert padded["input_ids"].shape == (2, 4)
    for inputs in (
        ["ab", "cde"],
        tokenizer(["ab", "cde"]),
        padded,
        [tokenizer("ab"), tokenizer("cde")],
        expected,
        [torch.tensor(tokens) for tokens in expected],
        ["ab", expected[1]],
    ):
        assert reader.read_all(inputs, "inputs") == expected
    assert reader.read_all(torch.tensor([[5, 6], [7, 8]]), "inputs") == [[5, 6], [7, 8]]
    assert reader.read_all("ab", "inputs") == expected[:1]
    assert reader.read_all(CHAT, "inputs") == [reader.read(CHAT, "p")]
    assert reader.read_all([CHAT, CHAT], "inputs") == 2 * [reader.read(CHAT, "p")]
    assert reader.read_all([], "inputs") == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5.0, 6.0], "p must be token ids, which are ints, got 5.0"),
        (torch.tensor([5.5]), "p must be token ids, which are ints, got 5.5"),
        (["4", "2"], "p must be token ids, which are ints, got '4'"),
        ([True], "p must be token ids, which are ints, got True"),
        ([[5], [6]], "p must be one prompt, got 2 rows"),
        (None, "p must be a text, a chat, .* got None"),
        (b"ab", "p must be a text, a chat, "),
        (5, "p must be a text, a chat, .* got 5"),
        ({"ids": [5]}, r"p must have input_ids, got \['ids'\]"),
        ([5, 6, 0, 0], "p must be without padding, got token 0 at an end"),
        ([0, 5, 6], "p must be without padding"),
        ({"input_ids": [5, 0]}, r"p\['input_ids'\] must be without padding"),
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            r"p\['input_ids'\] must be of the shape of attention_mask",
        ),
        (
            {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]},
            "must have its padding at an end",
        ),
    ],
)
def test_other_things_are_refused_by_name(reader, prompt, message):
    with pytest.raises(ValueError, match=message):
        reader.read(prompt, "p")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            [5, 6, 7],
            r"inputs must be a list of prompts, got the numbers of a single one",
        ),
        (torch.tensor([5, 6]), "inputs must have two dimensions, got 1"),
        (7, "inputs must be a list of prompts, got 7"),
        ([[5], [6.5]], r"inputs\[1\] must be token ids"),
        (torch.tensor([[5, 6], [7, 0]]), "inputs must be without padding"),
        ([[5, 6], [7, 0]], r"inputs\[1\] must be without padding"),
    ],
)
def test_other_batches_are_refused_by_name(reader, inputs, message):
    with pytest.raises(ValueError, match=message):
        reader.read_all(inputs, "inputs")


def test_images_are_refused(reader):
    with pytest.raises(NotImplementedError, match=r"text only, got \['pixel_values'\]"):
        reader.read({"input_ids": [5], "pixel_values": torch.zeros(1)}, "p")


def test_padding_that_also_ends_texts_is_padding_if_it_comes_twice():
    reader = PromptReader(None, pad_token_id=2, others=(2,))
    assert reader.read([5, 2], "p") == [5, 2]
    assert reader.read([2], "p") == [2]
    with pytest.raises(ValueError, match="without padding, got token 2"):
        reader.read([5, 2, 2], "p")


def test_texts_need_a_tokenizer():
    reader = PromptReader(None, pad_token_id=None, others=())
    for prompt in ("ab", CHAT):
        with pytest.raises(ValueError, match="tokenizer must be given to the engine"):
            reader.read(prompt, "p")
    assert reader.read([0, 5, 0], "p") == [0, 5, 0]
