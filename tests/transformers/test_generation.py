"""Generation with paged caches gives what the model's own generate gives with eager.

Most tests run on both routes: ``custom_generate=generate``, and the unchanged call in a
block of ``paged_generation``.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import torch_rpa.transformers as rpa_transformers
from tests.support.recorded_caches import SCALES, RecordedCaches, assert_only_scaled
from tests.test_readme import README, block, run
from tests.transformers.routes import (
    CACHE,
    EOS,
    PAD,
    build,
    character_tokenizer,
    custom_generate,
    eager_generate,
    generate_in_block,
    padded,
)
from torch_rpa.scheduling import OutOfPagesError
from torch_rpa.transformers import generation

# transformers 4.57 would rather have inputs on the device, where it compiles programs
# of its own to prepare them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.* on a device type different:UserWarning"
)

DEVICES = ["cpu", pytest.param("xla", marks=pytest.mark.torch_xla)]


@pytest.fixture(scope="module")
def eager():
    return build("eager")


@pytest.fixture(scope="module")
def paged():
    return build("rpa")


@pytest.fixture(scope="module")
def on_xla():
    import torch_xla

    model = build("rpa").to(torch_xla.device())
    model.tie_weights()
    torch_xla.sync()
    return model


@pytest.fixture(params=[custom_generate, generate_in_block], ids=lambda f: f.__name__)
def paged_generate(request):
    return request.param


@pytest.mark.parametrize("device", DEVICES)
def test_left_padded_prompts_give_the_tokens_of_eager(
    eager, request, device, paged_generate
):
    model = request.getfixturevalue("paged" if device == "cpu" else "on_xla")
    got = paged_generate(model, padded())
    assert torch.equal(got, eager_generate(eager, padded()))


@pytest.mark.parametrize("device", DEVICES)
def test_right_padded_prompts_continue_after_their_last_token(
    eager, request, device, paged_generate
):
    model = request.getfixturevalue("paged" if device == "cpu" else "on_xla")
    got = paged_generate(model, padded("right"))
    assert torch.equal(got[:, :21], padded("right")["input_ids"])
    assert torch.equal(got[:, 21:], eager_generate(eager, padded())[:, 21:])


def test_a_missing_mask_is_inferred_from_the_padding(eager, paged, paged_generate):
    inputs = {"input_ids": padded()["input_ids"]}
    assert torch.equal(paged_generate(paged, inputs), eager_generate(eager, inputs))


@pytest.mark.parametrize("max_tokens_per_step", [4, 10, 37])
def test_chunked_prefill_gives_the_same_tokens(
    eager, paged, max_tokens_per_step, paged_generate
):
    got = paged_generate(paged, padded(), max_tokens_per_step=max_tokens_per_step)
    assert torch.equal(got, eager_generate(eager, padded()))


@pytest.mark.parametrize("max_tokens_per_step", [None, 7])
def test_a_seed_samples_the_tokens_of_eager(
    eager, paged, max_tokens_per_step, paged_generate
):
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}
    torch.manual_seed(5)
    expected = eager_generate(eager, padded(), **sampling, num_return_sequences=2)
    torch.manual_seed(5)
    got = paged_generate(
        paged,
        padded(),
        **sampling,
        num_return_sequences=2,
        max_tokens_per_step=max_tokens_per_step and max_tokens_per_step + 4,
    )
    assert torch.equal(got, expected)
    assert not torch.equal(got[0], got[1])


def test_the_end_of_one_text_pads_it_and_leaves_the_others_alone(
    eager, paged, paged_generate
):
    free_running = eager_generate(eager, padded())[:, 21:]
    eos = int(free_running[0, 3])
    expected = eager_generate(eager, padded(), eos_token_id=eos)
    assert (expected[0, 25:] == PAD).all() and (expected[1:, -1] != PAD).any()
    assert torch.equal(paged_generate(paged, padded(), eos_token_id=eos), expected)


def test_processors_act_on_the_scores(eager, paged, paged_generate):
    keywords = {
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
        "eos_token_id": EOS,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [7, 8]],
        "prefix_allowed_tokens_fn": lambda row, tokens: list(range(row, 64)),
    }
    expected = eager_generate(eager, padded(), **keywords)
    assert not torch.equal(expected, eager_generate(eager, padded()))
    assert torch.equal(paged_generate(paged, padded(), **keywords), expected)


class StopsAtLength(StoppingCriteria):
    """Ends row r after r + 2 new tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        lengths = torch.arange(len(input_ids)) + 2
        return input_ids.shape[1] - 21 >= lengths


@pytest.mark.parametrize("eos", [{}, {"eos_token_id": EOS}])
def test_stopping_criteria_end_rows_as_in_eager(eager, paged, eos, paged_generate):
    keywords = {"stopping_criteria": StoppingCriteriaList([StopsAtLength()]), **eos}
    expected = eager_generate(eager, padded(), **keywords)
    assert expected.shape[1] == 21 + 5
    assert torch.equal(paged_generate(paged, padded(), **keywords), expected)


def test_stop_strings_end_rows_as_in_eager(eager, paged, paged_generate):
    tokenizer = character_tokenizer()
    text = tokenizer.decode(eager_generate(eager, padded())[0, 21:])
    keywords = {"stop_strings": [text[2:4], "no such text"], "tokenizer": tokenizer}
    keywords["eos_token_id"] = EOS  # rows that have ended are padded
    expected = eager_generate(eager, padded(), **keywords)
    assert (expected[0, 25:] == PAD).all()
    assert torch.equal(paged_generate(paged, padded(), **keywords), expected)
    with pytest.raises(ValueError, match="tokenizer"):
        paged_generate(paged, padded(), stop_strings="a")


def test_scores_and_logits_are_those_of_eager(eager, paged, paged_generate):
    keywords = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    expected = eager_generate(eager, padded(), **keywords)
    got = paged_generate(paged, padded(), **keywords)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(got[name]), torch.stack(expected[name])
        # Both sum in float32, in different orders.
        bound = 64 * torch.finfo(torch.float32).eps * theirs.abs().max()
        assert (ours - theirs).abs().max() <= bound


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_every_token(paged, paged_generate):
    streamer = Streamer()
    inputs = {"input_ids": torch.tensor([[3, 1, 4]])}
    tokens = paged_generate(paged, inputs, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist() and streamer.ended


def test_pages_are_given_back_when_a_text_ends(paged, monkeypatch):
    batches = []

    class Batch(generation.LockstepBatch):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            batches.append(self)

    monkeypatch.setattr(generation, "LockstepBatch", Batch)
    eos = int(custom_generate(paged, padded())[0, 24])
    custom_generate(paged, padded(), eos_token_id=eos)
    assert batches[1].requests[0].pages == []


def test_too_few_pages_are_reported(paged, paged_generate):
    with pytest.raises(OutOfPagesError, match="raise num_pages"):
        paged_generate(paged, padded(), num_pages=4)


@pytest.mark.parametrize("kind", SCALES)
def test_scales_divide_what_is_stored_and_change_no_token(
    paged, paged_generate, monkeypatch, kind
):
    caches = RecordedCaches(monkeypatch)
    expected = paged_generate(paged, padded())
    unscaled = caches.last()
    k_scale, v_scale = SCALES[kind]
    got = paged_generate(paged, padded(), k_scale=k_scale, v_scale=v_scale)
    assert torch.equal(got, expected)
    assert_only_scaled(caches.last(), unscaled, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "page_size must be at least 1, .* got 0"),
        ({"page_size": "8"}, "page_size must be an int, got '8'"),
        ({"num_pages": 0}, "num_pages must be at least 1, .* got 0"),
        ({"max_tokens_per_step": 0}, "max_tokens_per_step must be at least 1, .*got 0"),
        ({"cache_dtype": "int8"}, "cache_dtype must be a torch.dtype or None, got 'i"),
        ({"k_scale": 0}, "k_scale must be a positive Python number .* got 0"),
        ({"v_scale": "1"}, "v_scale must be a positive Python number .* got '1'"),
        ({"k_scale": [1.0]}, "k_scale must .* each of the 2 layers, got 1"),
    ],
)
def test_options_out_of_range_are_refused(paged, options, message, paged_generate):
    with pytest.raises(ValueError, match=message):
        paged_generate(paged, padded(), **options)


@pytest.mark.slow
@pytest.mark.torch_xla
@pytest.mark.filterwarnings("ignore:input_ids are on xla:UserWarning")
def test_inputs_on_the_xla_device_work_too(eager, on_xla, paged_generate):
    import torch_xla

    inputs = {name: t.to(torch_xla.device()) for name, t in padded().items()}
    keywords = {"min_new_tokens": 4, "eos_token_id": EOS, "max_new_tokens": 5}
    got = paged_generate(on_xla, inputs, **keywords)
    assert got.device.type == "xla"
    assert torch.equal(got.cpu(), eager_generate(eager, padded(), **keywords))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_beams": 2}, "greedy or sampling, got 'beam_search'"),
        ({"prompt_lookup_num_tokens": 2}, "got 'assisted_generation'"),
        ({CACHE: DynamicCache()}, "past_key_values must be .*DynamicCache"),
        ({"output_hidden_states": True}, "output_hidden_states must be False"),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"guidance_scale": 1.5}, "guidance_scale must be left out, got 1.5"),
        (
            {"position_ids": torch.arange(21).expand(4, 21)},
            "position_ids must count the tokens",
        ),
        ({"inputs_embeds": torch.zeros(4, 21, 64)}, "inputs_embeds"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_what_would_change_the_answer_is_refused(
    paged, keywords, message, paged_generate
):
    if keywords.keys() & {"output_hidden_states", "output_attentions"}:
        keywords = {**keywords, "return_dict_in_generate": True}
    with pytest.raises((NotImplementedError, ValueError), match=message):
        paged_generate(paged, padded(), **keywords)


def test_an_assistant_is_refused(paged, eager, paged_generate):
    inputs = {name: tensor[3:] for name, tensor in padded().items()}
    with pytest.raises(NotImplementedError, match="assisted_generation"):
        paged_generate(paged, inputs, assistant_model=eager)


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
def test_a_mask_with_holes_is_refused(paged, mask):
    inputs = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "attention_mask": torch.tensor([mask]),
    }
    with pytest.raises(ValueError, match="padding on one side"):
        custom_generate(paged, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_float16_are_refused_by_name(paged, dtype, paged_generate):
    with (
        torch.autocast("cpu", dtype=dtype),
        pytest.raises(NotImplementedError, match=r"torch\.autocast must be off"),
    ):
        paged_generate(paged, padded())
    half = build("rpa").to(torch.float16)
    with pytest.raises(
        NotImplementedError, match=r"load it with dtype=torch\.bfloat16"
    ):
        paged_generate(half, padded())


def test_another_attention_is_refused(eager, paged_generate):
    with pytest.raises(ValueError, match="'rpa', got 'eager'"):
        paged_generate(eager, padded())


def test_generate_without_the_paged_loop_is_refused(paged):
    with pytest.raises(ValueError, match="custom_generate="):
        eager_generate(paged, padded())


def test_the_implementation_can_be_switched_on_a_built_model(eager, paged_generate):
    model = build("eager")
    model.set_attn_implementation("rpa")
    rpa_transformers.register()  # may be repeated
    got = paged_generate(model, padded())
    assert torch.equal(got, eager_generate(eager, padded()))


def test_a_saved_model_loads_with_this_attention(eager, tmp_path, paged_generate):
    build("eager").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="rpa")
    got = paged_generate(model, padded(), pad_token_id=PAD)
    assert torch.equal(got, eager_generate(eager, padded()))


@pytest.mark.slow
@pytest.mark.torch_xla
def test_the_examples_of_the_readme_run_as_printed(eager, tmp_path):
    build("eager").save_pretrained(tmp_path)
    names = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": tmp_path,
        "inputs": {**padded(), "max_new_tokens": 3, "pad_token_id": PAD},
    }
    for needed in ("name, inputs", "rpa_transformers, model, inputs"):
        run(block(f"fragment: {needed}"), README, names)
        expected = eager_generate(eager, padded(), max_new_tokens=3)
        assert torch.equal(names.pop("tokens"), expected)
