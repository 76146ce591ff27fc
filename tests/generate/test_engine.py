"""Generation for all prompts at once equals the model's own, one by one."""

import pytest
import torch

from torch_rpa.generate import engine
from torch_rpa.generate.check import reference_generate
from torch_rpa.generate.engine import EngineOptions, generate
from torch_rpa.generate.page_allocator import OutOfPagesError

NEW_TOKENS = 12


def expected_tokens(model, prompts, **keywords):
    return [
        reference_generate(model, prompt, max_new_tokens=NEW_TOKENS, **keywords)
        for prompt in prompts
    ]


def options(**keywords):
    defaults = {"device": "cpu", "max_new_tokens": NEW_TOKENS, "page_size": 8}
    return EngineOptions(**{**defaults, **keywords})


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_tokens_equal_the_models_own(llama, prompts, device, head_dim):
    expected = expected_tokens(llama("eager", head_dim=head_dim), prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    result = generate(llama("rpa", head_dim=head_dim), prompts, options(device=device))
    assert result.generated == expected
    assert result.num_generated == len(prompts) * NEW_TOKENS
    assert [step.num_tokens for step in result.steps] == [39] + [4] * 11


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_prefill_in_chunks_gives_the_same_tokens(llama, prompts, device):
    result = generate(
        llama("rpa"), prompts, options(device=device, max_tokens_per_step=10)
    )
    assert result.generated == expected_tokens(llama("eager"), prompts)
    assert max(step.num_tokens for step in result.steps) == 10


def test_multi_query_and_multi_head_models_agree(llama, prompts):
    for num_kv_heads in (1, 4):
        expected = expected_tokens(llama("eager", num_kv_heads=num_kv_heads), prompts)
        model = llama("rpa", num_kv_heads=num_kv_heads)
        assert generate(model, prompts, options()).generated == expected


def test_prefill_and_decode_compile_two_programs_and_a_second_run_none(llama, prompts):
    # A page size of its own, so that no other test has compiled these programs.
    on_xla = options(device="xla", page_size=32)
    first = generate(llama("rpa"), prompts, on_xla)
    assert [step.num_compilations for step in first.steps] == [1, 1] + [0] * 10
    second = generate(llama("rpa"), prompts, on_xla)
    assert second.num_compilations == 0
    assert second.generated == first.generated
    assert second.compiled_tokens_per_second == second.tokens_per_second > 0


def test_steps_on_xla_leave_nothing_to_the_cpu(llama, prompts):
    import torch_xla.debug.metrics as metrics

    metrics.clear_counters()
    generate(llama("rpa"), prompts, options(device="xla"))
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []


def test_caches_on_xla_keep_their_buffers(llama, prompts, monkeypatch):
    import torch_xla

    pointers = []

    class Runner(engine.ModelRunner):
        def step(self, inputs):
            tokens = super().step(inputs)
            pointer = torch_xla._XLAC._unsafe_buffer_pointer
            pointers.append([pointer(cache) for cache in self.kv_caches])
            return tokens

    monkeypatch.setattr(engine, "ModelRunner", Runner)
    generate(llama("rpa"), prompts, options(device="xla"))
    assert len(pointers) == NEW_TOKENS
    assert pointers == pointers[:1] * NEW_TOKENS


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.int8])
def test_bfloat16_models_run_with_every_kind_of_cache(
    llama, prompts, device, cache_dtype
):
    model = llama("rpa").to(torch.bfloat16)
    result = generate(model, prompts, options(device=device, cache_dtype=cache_dtype))
    assert [len(tokens) for tokens in result.generated] == [NEW_TOKENS] * len(prompts)


def test_the_first_bfloat16_token_is_nearly_the_best(llama, prompts):
    # The budget: twice what rounding the model itself to bfloat16 costs.
    exact, rounded = llama("eager"), llama("eager").to(torch.bfloat16)
    result = generate(llama("rpa").to(torch.bfloat16), prompts, options())
    for prompt, tokens in zip(prompts, result.generated, strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt])).logits[0, -1]
            error = (rounded(torch.tensor([prompt])).logits[0, -1] - logits).abs().max()
        assert logits[tokens[0]] >= logits.max() - 2 * error


def test_end_of_text_frees_pages_and_leaves_the_others_alone(llama, prompts):
    # A token that some prompts generate early and others late or never.
    free_running = expected_tokens(llama("eager"), prompts)
    eos = free_running[0][3]
    expected = expected_tokens(llama("eager"), prompts, eos_token_ids=[eos])
    assert len(expected[0]) == free_running[0].index(eos) + 1 < NEW_TOKENS
    assert max(map(len, expected)) == NEW_TOKENS
    result = generate(llama("rpa"), prompts, options(), eos_token_ids=[eos])
    assert result.generated == expected
    assert result.steps[-1].num_tokens < len(prompts)


def test_the_default_number_of_pages_is_exactly_enough(llama, prompts):
    # 1 + 11, 8 + 11, 9 + 11 and 21 + 11 cached tokens in pages of 8: 2 + 3 + 3 + 4.
    result = generate(llama("rpa"), prompts, options(num_pages=12))
    assert result.generated == generate(llama("rpa"), prompts, options()).generated
    with pytest.raises(OutOfPagesError, match="of 11 are free: raise num_pages"):
        generate(llama("rpa"), prompts, options(num_pages=11))


@pytest.mark.parametrize(
    ("prompts", "keywords", "message"),
    [
        ([], {}, "at least one prompt, got none"),
        ([[1] * 501], {}, "512 positions together, got 513"),
        ([[1]], {"device": "cuda"}, "'xla' or 'cpu', got 'cuda'"),
        ([[1]], {"page_size": 12}, "page_size must be a power of two"),
    ],
)
def test_impossible_requests_are_refused(llama, prompts, keywords, message):
    with pytest.raises(ValueError, match=message):
        generate(llama("rpa"), prompts, options(**keywords))
