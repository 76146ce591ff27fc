"""The block of ``paged_generation``: what is its own besides equal tokens."""

import contextlib
import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, pipeline
from transformers.generation.configuration_utils import GenerationMode

from tests.transformers.routes import (
    CACHE,
    PAD,
    build,
    character_tokenizer,
    eager_generate,
    padded,
)
from torch_rpa.scheduling import OutOfPagesError
from torch_rpa.transformers import (
    PagedCache,
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
    generate,
    paged_generation,
)

REPLACED = {
    "forward",
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
}


@pytest.fixture(scope="module")
def eager():
    return build("eager")


@pytest.fixture
def paged():
    return build("rpa")


@torch.no_grad()
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


def with_cache(model, inputs, **keywords):
    """Generates; returns the tokens and the cache, as transformers names it."""
    out = eager_generate(model, inputs, return_dict_in_generate=True, **keywords)
    return out.sequences, out[CACHE]


def continued(sequences, mask):
    """A next turn of three tokens for each sequence, one of them masked in row 0."""
    turn = torch.tensor([[7, 8, 9]]).expand(len(sequences), 3)
    num_new = sequences.shape[1] - mask.shape[1]
    seen = torch.cat([mask, torch.ones(len(mask), num_new, dtype=torch.long)], dim=1)
    turn_mask = torch.ones(len(mask), 3, dtype=torch.long)
    turn_mask[0, 1] = 0
    return {
        "input_ids": torch.cat([sequences, turn], dim=1),
        "attention_mask": torch.cat([seen, turn_mask], dim=1),
    }


def test_two_turns_with_one_cache_give_the_tokens_of_eager(eager, paged):
    expected = eager_generate(eager, padded())
    second = continued(expected, padded()["attention_mask"])
    expected = eager_generate(eager, second)
    with paged_generation(paged, page_size=8, max_length=60):
        sequences, cache = with_cache(paged, padded())
        assert isinstance(cache, PagedCache)
        assert cache.get_seq_length() == sequences.shape[1] - 1
        got = eager_generate(paged, second, **{CACHE: cache})
    assert torch.equal(got, expected)


def test_a_mask_with_holes_gives_the_tokens_of_eager(eager, paged):
    inputs = {
        "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]),
    }
    with paged_generation(paged):
        got = eager_generate(paged, inputs)
    assert torch.equal(got, eager_generate(eager, inputs))


def test_custom_generate_and_a_context_work_in_the_block(eager, paged):
    caches = empty_kv_caches(paged, 2, 8, dtype=torch.float32, device="cpu")
    tensors = ([3], [1, 0], [0, 3], [0, 0, 1])
    batch = RaggedBatch(*(torch.tensor(t, dtype=torch.int32) for t in tensors))
    tokens = torch.tensor([[3, 4, 5]])
    with paged_generation(paged):
        got = eager_generate(paged, padded(), custom_generate=generate)
        context = RPAContext(caches, batch)
        logits = call(paged, tokens, use_cache=False, rpa=context).logits
    assert torch.equal(got, eager_generate(eager, padded()))
    torch.testing.assert_close(logits, call(eager, tokens).logits)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_after_the_block(paged, fails):
    before = {name: getattr(paged, name) for name in REPLACED}
    with (
        pytest.raises(ZeroDivisionError) if fails else torch.no_grad(),
        paged_generation(paged),
    ):
        assert REPLACED <= vars(paged).keys()
        _, cache = with_cache(paged, padded())
        kv_cache = weakref.ref(cache._batch.runner.kv_caches[0])
        if fails:
            raise ZeroDivisionError
    gc.collect()
    assert kv_cache() is None
    assert not REPLACED & vars(paged).keys()
    assert {name: getattr(paged, name) for name in REPLACED} == before
    with pytest.raises(ValueError, match="custom_generate="):
        eager_generate(paged, padded())
    with (
        paged_generation(paged, max_length=60),
        pytest.raises(ValueError, match=r"made in this block .* got PagedCache"),
    ):
        call(paged, torch.tensor([[1]]), **{CACHE: cache})


def test_a_method_of_the_instance_is_put_back(paged):
    own = paged.forward = paged.forward
    with paged_generation(paged):
        assert paged.forward is not own
    assert vars(paged)["forward"] is own


def test_an_error_in_a_step_ends_the_cache(paged):
    with paged_generation(paged, page_size=8, num_pages=8, max_length=60):
        inputs = {"input_ids": torch.tensor([[3, 4, 5] * 3, [6, 7, 8] * 3])}
        tokens, cache = with_cache(paged, inputs)
        both = torch.cat([tokens, tokens], dim=1)
        more = {"input_ids": both, "attention_mask": torch.ones_like(both)}
        with pytest.raises(OutOfPagesError, match="raise num_pages"):
            eager_generate(paged, more, **{CACHE: cache})
        with pytest.raises(ValueError, match="after an error"):
            eager_generate(paged, more, **{CACHE: cache})
        # Other calls are not affected.
        assert torch.equal(eager_generate(paged, inputs), tokens)


def test_another_attention_is_refused(paged):
    with pytest.raises(ValueError, match="'rpa', got 'eager'"):
        with paged_generation(build("eager")):
            pass
    with paged_generation(paged, max_length=60):
        tokens, cache = with_cache(paged, padded())
        paged.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="'rpa', got 'eager'"):
            eager_generate(paged, padded())
        with pytest.raises(ValueError, match="'rpa', got 'eager'"):
            call(paged, tokens[:, -1:], **{CACHE: cache})


@pytest.mark.parametrize("attention", ["eager", "sdpa", "rpa"])
def test_a_paged_cache_is_refused_outside_its_block(paged, attention):
    with paged_generation(paged, max_length=60):
        tokens, cache = with_cache(paged, padded())
    other = build(attention)
    with pytest.raises((NotImplementedError, ValueError), match="PagedCache"):
        call(other, tokens[:, -1:], **{CACHE: cache})
    with pytest.raises((NotImplementedError, ValueError), match=r"PagedCache|paged"):
        eager_generate(other, {"input_ids": tokens}, **{CACHE: cache})


def test_a_second_block_is_refused(paged):
    with paged_generation(paged):
        with pytest.raises(ValueError, match="block of paged_generation already"):
            with paged_generation(paged):
                pass
        assert REPLACED <= vars(paged).keys()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_beams": 2}, "got 'beam_search'"),
        ({"num_beams": 2, "do_sample": True}, "got 'beam_sample'"),
        ({"prompt_lookup_num_tokens": 2}, "got 'assisted_generation'"),
        ({"prefill_chunk_size": 4}, "max_tokens_per_step="),
        ({"cache_implementation": "quantized"}, "cache_implementation must be left"),
        ({"max_new_tokens": 50}, "room for 40 tokens .* got 70: raise max_length"),
    ],
)
def test_other_ways_to_generate_are_refused(paged, keywords, message):
    with (
        paged_generation(paged, max_length=40),
        pytest.raises((NotImplementedError, ValueError), match=message),
    ):
        eager_generate(paged, padded(), **keywords)


def test_every_mode_but_greedy_and_sampling_is_refused(paged):
    """Also those that transformers itself stops before they reach this."""
    allowed = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
    with paged_generation(paged):
        for mode in set(GenerationMode) - allowed:
            with pytest.raises(NotImplementedError, match=f"got '{mode.value}'"):
                paged._prepare_cache_for_generation(GenerationConfig(), {}, mode, 1, 9)


def test_training_and_gradients_are_refused(paged):
    with paged_generation(paged, max_length=60):
        tokens, cache = with_cache(paged, padded())
        with pytest.raises(NotImplementedError, match=r"torch\.no_grad\(\)"):
            paged(tokens[:, -1:], logits_to_keep=1, **{CACHE: cache})
        paged.train()
        with pytest.raises(NotImplementedError, match="training=True"):
            eager_generate(paged, padded())


def one_column(**changes):
    """Arguments of a call that gives every sequence of ``padded()`` its next token."""
    mask = torch.cat([padded()["attention_mask"], torch.ones(4, 12).long()], dim=1)
    arguments = {"input_ids": torch.full((4, 1), 5), "attention_mask": mask}
    return {**arguments, "logits_to_keep": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": None}, "must hide the padding .* got None"),
        ({"attention_mask": torch.ones(4, 33)}, "got another padding"),
        ({"attention_mask": torch.ones(4, 1)}, r"shape \[4, 33\] .* got \[4, 1\]"),
        ({"attention_mask": torch.ones(4, 1, 1, 33)}, r"got \[4, 1, 1, 33\]"),
        ({"input_ids": torch.full((3, 1), 5)}, r"the 4 sequences .* \[3, 1\]"),
        ({"input_ids": torch.ones(4, 0)}, r"new columns .* \[4, 0\]"),
        ({"position_ids": torch.full((4, 1), 32)}, "position_ids must count"),
        ({"input_ids": None}, "must be called with input_ids"),
        ({"logits_to_keep": 0}, "logits_to_keep=1"),
        ({"labels": torch.ones(4, 1)}, "labels"),
        ({"return_dict": False}, "return_dict=True"),
        ({CACHE: None}, "made in this block .* got NoneType"),
        ({CACHE: DynamicCache()}, "made in this block .* got DynamicCache"),
    ],
)
def test_a_call_that_disagrees_with_the_cache_is_refused(paged, changes, message):
    with paged_generation(paged, max_length=60):
        _, cache = with_cache(paged, padded())
        assert cache.get_seq_length() == 32
        with pytest.raises((NotImplementedError, ValueError), match=message):
            call(paged, **{CACHE: cache, **one_column(**changes)})
        # The refused call has left no trace.
        got = call(paged, **{CACHE: cache}, **one_column()).logits
    assert got.shape == (4, 1, 64)


def test_a_row_without_tokens_is_refused(paged):
    inputs = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3)}
    inputs["attention_mask"][1] = 0
    with (
        paged_generation(paged),
        pytest.raises(ValueError, match=r"one token in each row, got \[3, 0\]"),
    ):
        eager_generate(paged, inputs)


def test_a_call_without_a_cache_gives_the_same_tokens(eager, paged):
    with paged_generation(paged):
        got = eager_generate(paged, padded(), use_cache=False)
    assert torch.equal(got, eager_generate(eager, padded()))


def next_turn(sequences, mask):
    """Three more tokens for each row of a chat."""
    turn = torch.tensor([[7, 8, 9]]).expand(len(sequences), 3)
    return {
        "input_ids": torch.cat([sequences, turn], dim=1),
        "attention_mask": torch.cat([mask, torch.ones_like(turn)], dim=1),
    }


def test_a_chat_goes_on_after_rows_that_ended_at_different_steps(eager, paged):
    """What was padding to the caller, after the end of a text, is hidden later."""
    tokens = eager_generate(eager, padded())
    eos = [int(tokens[1, 22]), int(tokens[2, 26])]
    first = {"eos_token_id": eos}
    results = []
    for model in (eager, paged):
        with paged_generation(paged, max_length=80):
            sequences, cache = with_cache(model, padded(), **first)
            is_text = sequences[:, 21:] != PAD
            assert len(set(is_text.sum(dim=1).tolist())) > 2
            mask = torch.cat([padded()["attention_mask"], is_text.long()], dim=1)
            inputs = next_turn(sequences, mask)
            results.append(eager_generate(model, inputs, **{CACHE: cache}))
            if model is paged:
                more = next_turn(results[1], torch.ones_like(results[1]))
                with pytest.raises(ValueError, match="must hide the padding"):
                    eager_generate(model, more, **{CACHE: cache})
    assert torch.equal(*results)


def test_tokens_inside_of_a_row_cannot_be_hidden_later(paged):
    with paged_generation(paged, max_length=60):
        sequences, cache = with_cache(paged, padded())
        mask = torch.cat([padded()["attention_mask"], torch.ones(4, 12).long()], dim=1)
        mask[2, 25] = 0
        with pytest.raises(NotImplementedError, match="at the end of a row alone"):
            eager_generate(paged, next_turn(sequences, mask), **{CACHE: cache})


@pytest.mark.parametrize("crop", [-8, 24])
def test_a_cropped_cache_goes_on_from_there(eager, paged, crop):
    sequences = eager_generate(eager, padded())
    mask = torch.cat([padded()["attention_mask"], torch.ones(4, 4).long()], dim=1)
    inputs = next_turn(sequences[:, :25], mask)
    with paged_generation(paged, max_length=60):
        _, cache = with_cache(paged, padded())
        with pytest.raises(ValueError, match="at least -32, got -33"):
            cache.crop(-33)
        cache.crop(crop)
        assert cache.get_seq_length() == 24
        got = eager_generate(paged, inputs, **{CACHE: cache})
        cache.crop(27)
        again = eager_generate(paged, inputs, **{CACHE: cache})
    assert torch.equal(got, eager_generate(eager, inputs))
    assert torch.equal(again, got)


def test_copies_of_a_cache_go_on_by_themselves(eager, paged):
    """The recipe of transformers for prompts with a common beginning."""
    beginning = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}
    with paged_generation(paged, max_length=40):
        _, cache = with_cache(paged, beginning, max_new_tokens=1)
        for rest in ([8, 9], [10, 11, 12]):
            inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, *rest]])}
            copied = copy.deepcopy(cache)
            got = eager_generate(paged, inputs, **{CACHE: copied})
            assert torch.equal(got, eager_generate(eager, inputs))
        assert cache.get_seq_length() == 5
        with pytest.raises(ValueError, match=r"more columns than .* got 7 and 19"):
            eager_generate(paged, {"input_ids": got[:, :7]}, **{CACHE: copied})
    with pytest.raises(ValueError, match="after the block"):
        copied.next_logits(torch.tensor([[1]]), None, None)


@pytest.mark.parametrize(
    "method",
    [
        "batch_repeat_interleave",
        "batch_select_indices",
        "reorder_cache",
        "reset",
    ],
)
def test_what_other_modes_do_to_a_cache_is_refused(paged, method):
    with paged_generation(paged):
        _, cache = with_cache(paged, padded())
        with pytest.raises(NotImplementedError, match=f"{method} of a PagedCache"):
            getattr(cache, method)(*[] if method == "reset" else [torch.arange(4)])


def test_a_cache_says_what_transformers_asks(paged):
    with paged_generation(paged, max_length=60):
        _, cache = with_cache(paged, padded())
        name = "get_max_length" if hasattr(cache, "get_max_length") else None
        assert getattr(cache, name or "get_max_cache_shape")() == 60
        assert not cache.is_compileable
        assert not any(cache.is_sliding)


@pytest.mark.parametrize("in_block", [True, False])
def test_a_text_generation_pipeline_runs_unchanged(eager, paged, in_block):
    """Also with strings that end a text, for which transformers passes a tokenizer."""
    texts, stopped = [], []
    for model in (eager, paged):
        tokenizer = character_tokenizer()
        generator = pipeline("text-generation", model, tokenizer=tokenizer)
        keywords: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        keywords["batch_size"] = 2
        block = contextlib.nullcontext()
        if model is paged and in_block:
            block = paged_generation(model)
        elif model is paged:
            keywords["custom_generate"] = generate
        with block:
            texts.append(generator(["34567", "89"], **keywords))
            end = texts[0][0][0]["generated_text"][6:8]
            stopped.append(generator("34567", stop_sequence=end, **keywords))
    assert texts[0] == texts[1] and stopped[0] == stopped[1]
    assert len(stopped[0][0]["generated_text"]) < 5 + 6


@pytest.mark.torch_xla
def test_inputs_on_the_xla_device_are_warned_of():
    import torch_xla

    model = build("rpa").to(torch_xla.device())
    model.tie_weights()
    with (
        paged_generation(model),
        pytest.warns(UserWarning, match="keep them on the CPU"),
    ):
        inputs = {"input_ids": torch.tensor([[3, 4]]).to(torch_xla.device())}
        eager_generate(model, inputs, max_new_tokens=1)
