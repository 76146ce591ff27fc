"""A text that follows a grammar token by token is what was asked for."""

import json
import random
import re
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import StructuredOutputsParams
from torch_rpa.serving.structured import GrammarFactory

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def fast_tokenizer():
    """Bytes, and the merges of some pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "g"), ("ag", "e"), ('"', ":"), ("n", "a"), ("m", "e")]
    tokens = [*alphabet, *("".join(pair) for pair in merges), "<end>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module", params=["bytes", "fast"])
def tokenizer(request):
    pytest.importorskip("llguidance")
    return ByteTokenizer() if request.param == "bytes" else fast_tokenizer()


def random_text(tokenizer, params, seed):
    """Follows the grammar at random until it is complete or the end is drawn."""
    vocabulary = 300  # more logits than tokens, as many models have
    grammar = GrammarFactory(tokenizer, vocabulary, ()).grammar(params)
    generator, tokens = random.Random(seed), []
    while not grammar.is_complete:
        bits = np.unpackbits(grammar.allowed_words().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        assert allowed and max(allowed) < vocabulary
        # Any text first, or it would rarely get to its end.
        likely = [t for t in allowed if t < 128] or allowed
        token = generator.choice(likely)
        grammar.accept(token)
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_a_text_follows_its_json_schema(tokenizer, schema):
    for seed in range(5):
        text = random_text(tokenizer, StructuredOutputsParams(json=schema), seed)
        value = json.loads(text)
        assert len(value["name"]) <= 8 and 0 <= value["age"] <= 99
        assert value.keys() <= SCHEMA["properties"].keys()
        assert set(value.get("tags", ())) <= {"a", "b"}


def test_a_text_matches_its_regular_expression(tokenizer):
    expression = r"[a-f]{2,5}(é|\d+x)"
    texts = [
        random_text(tokenizer, StructuredOutputsParams(regex=expression), seed)
        for seed in range(8)
    ]
    assert all(re.fullmatch(expression, text) for text in texts)
    assert len(set(texts)) > 4


def test_a_text_is_one_of_the_choices(tokenizer):
    choices = ["yes", 'a "quoted" one', "no\n", "naïve"]
    texts = {
        random_text(tokenizer, StructuredOutputsParams(choice=choices), seed)
        for seed in range(20)
    }
    assert texts == set(choices)


@pytest.mark.parametrize(
    "fields", [{"json": "{"}, {"json": {"type": "nonsense"}}, {"regex": "(a"}]
)
def test_what_cannot_be_followed_is_refused(tokenizer, fields):
    factory = GrammarFactory(tokenizer, 300, ())
    message = f"structured_outputs.{next(iter(fields))} must be one that llguidance"
    with pytest.raises(ValueError, match=message) as caught:
        factory.grammar(StructuredOutputsParams(**fields))
    assert "\n" not in str(caught.value)


def test_a_token_that_is_not_allowed_is_an_error(tokenizer):
    factory = GrammarFactory(tokenizer, 300, ())
    grammar = factory.grammar(StructuredOutputsParams(regex="[ab]+"))
    with pytest.raises(RuntimeError, match="structured_outputs cannot go on") as caught:
        grammar.accept(tokenizer.encode("c")[-1])
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(monkeypatch):
    params = StructuredOutputsParams(regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install '.\[structured\]'"):
        GrammarFactory(ByteTokenizer(), 258, ()).grammar(params)
    monkeypatch.undo()
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match="tokenizer must be given to the engine"):
        GrammarFactory(None, 258, ()).grammar(params)
    with pytest.raises(NotImplementedError, match="got object"):
        GrammarFactory(object(), 258, ()).grammar(params)
    tokenizer = fast_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # does not tell the bytes
    with pytest.raises(NotImplementedError, match="bytes of each token, got"):
        GrammarFactory(tokenizer, 300, ()).grammar(params)
