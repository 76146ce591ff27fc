"""The registered operators on CPU, fake and unsupported tensors."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import torch_rpa
from tests.torch_rpa.calls import make_call, raw_bytes, to_device
from torch_rpa import ops

CACHE_DTYPES = [
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_opcheck_passes_for_the_mutating_operator(cache_dtype):
    call = make_call(cache_dtype=cache_dtype)
    tests = [
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if cache_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        tests.append("test_schema")  # PyTorch cannot compare float8 tensors there
    torch.library.opcheck(ops.ragged_paged_attention, tuple(call), test_utils=tests)


def test_opcheck_passes_for_the_functional_operators():
    call = tuple(make_call(sinks=True))
    options = {"sm_scale": 0.1, "sliding_window": 4, "out_dtype": torch.bfloat16}
    torch.library.opcheck(ops.ragged_paged_attention_functional, call, options)
    options["update_kv_cache"] = False
    torch.library.opcheck(ops.ragged_paged_attention_readonly, call, options)


def test_opcheck_passes_for_the_operators_with_logarithms():
    call = tuple(make_call(cache_dtype=torch.float32))
    options: dict[str, Any] = {"attend": "cache", "sliding_window": 4}
    torch.library.opcheck(ops.WITH_LSE.public, call, options)
    torch.library.opcheck(ops.WITH_LSE.functional, call, options)
    options["update_kv_cache"] = False
    torch.library.opcheck(ops.WITH_LSE.readonly, call, options)


def test_mutating_and_functional_operators_agree_and_the_latter_leaves_the_cache():
    call, functional_call = make_call(), make_call()
    before = functional_call.kv_cache.clone()
    out = ops.ragged_paged_attention(*call)
    functional_out, new_cache = ops.ragged_paged_attention_functional(*functional_call)
    assert torch.equal(out, functional_out)
    assert torch.equal(call.kv_cache, new_cache)
    assert torch.equal(functional_call.kv_cache, before)


def test_reading_a_cache_gives_what_writing_it_gave():
    call = make_call()
    out = ops.ragged_paged_attention(*call)
    before = call.kv_cache.clone()
    without_keys = call._replace(k=None, v=None)
    again = ops.ragged_paged_attention(*without_keys, update_kv_cache=False)
    assert torch.equal(out, again)
    assert torch.equal(call.kv_cache, before)


def test_float8_probabilities_round_nothing_on_cpu_tensors():
    call, rounded_call = (make_call(cache_dtype=torch.float8_e4m3fn) for _ in range(2))
    rounds: dict[str, Any] = {"probabilities_dtype": torch.float8_e4m3fn}
    out = ops.ragged_paged_attention(*call)
    assert torch.equal(out, ops.ragged_paged_attention(*rounded_call, **rounds))
    with pytest.raises(NotImplementedError, match="probabilities_dtype float8_e4m3fn"):
        ops.ragged_paged_attention(*make_call(), **rounds)


def test_functional_operators_refuse_the_other_ones_job():
    call = make_call()
    with pytest.raises(ValueError, match="use rpa::ragged_paged_attention_readonly"):
        ops.ragged_paged_attention_functional(*call, update_kv_cache=False)
    with pytest.raises(ValueError, match="use rpa::ragged_paged_attention_functional"):
        ops.ragged_paged_attention_readonly(*call)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_fake_output_has_the_shape_and_dtype_of_the_real_one(out_dtype):
    call = make_call()
    real = ops.ragged_paged_attention(*call, out_dtype=out_dtype)
    with FakeTensorMode() as mode:
        fake_call = [None if t is None else mode.from_tensor(t) for t in call]
        fake = ops.ragged_paged_attention(*fake_call, out_dtype=out_dtype)
    meta = ops.ragged_paged_attention(*to_device(call, "meta"), out_dtype=out_dtype)
    for other in (fake, meta):
        assert (other.shape, other.dtype) == (real.shape, real.dtype)
        assert other.stride() == real.stride()


def test_fake_tensors_are_validated():
    call = to_device(make_call(), "meta")
    with pytest.raises(ValueError, match="kv_lens must be"):
        ops.ragged_paged_attention(*call._replace(kv_lens=call.kv_lens.long()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "function", [ops.ragged_paged_attention, torch_rpa.ragged_paged_attention]
)
def test_compiles_as_one_graph_and_updates_in_place(backend, function):
    def step(*tensors):
        return function(*tensors, sm_scale=0.1, sliding_window=6) * 2

    call, expected_call = make_call(sinks=True), make_call(sinks=True)
    expected = step(*expected_call)
    out = torch.compile(step, backend=backend, fullgraph=True)(*call)
    assert torch.equal(out, expected)
    assert torch.equal(call.kv_cache, expected_call.kv_cache)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_asking_for_a_gradient_is_an_error(device, name):
    call = to_device(make_call(sinks=True), device)
    getattr(call, name).requires_grad_()
    for operator in (ops.ragged_paged_attention, ops.ragged_paged_attention_functional):
        with pytest.raises(NotImplementedError, match=r"no backward.*torch\.no_grad"):
            operator(*call)
    with torch.no_grad():
        ops.ragged_paged_attention(*call)
    with torch.inference_mode():
        ops.ragged_paged_attention(*call)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_asking_for_a_tangent_is_an_error(name):
    call = make_call(sinks=True)
    before = raw_bytes(call.kv_cache).clone()
    primal = getattr(call, name)
    with forward_ad.dual_level():
        dual = call._replace(**{name: forward_ad.make_dual(primal, primal)})
        for operator in (
            ops.ragged_paged_attention,
            ops.ragged_paged_attention_functional,
        ):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                operator(*dual)
            with (
                torch.no_grad(),
                pytest.raises(NotImplementedError, match="no forward-mode derivative"),
            ):
                operator(*dual)
        assert torch.equal(raw_bytes(call.kv_cache), before)
        ops.ragged_paged_attention(*call)


def test_other_kinds_of_tensors_are_an_error_that_names_the_alternatives():
    call = make_call()
    call = call._replace(q=call.q.to_sparse())
    with pytest.raises(NotImplementedError, match="move the tensors to 'xla'"):
        ops.ragged_paged_attention_functional(*call)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["update_kv_cache", "causal", "sm_scale"])
def test_none_for_an_option_that_has_a_value_is_refused(device, name):
    call = to_device(make_call(), device)
    before = raw_bytes(call.kv_cache) if device == "cpu" else None
    option: dict[str, Any] = {name: None}
    for operator in (ops.ragged_paged_attention, ops.ragged_paged_attention_functional):
        with pytest.raises(ValueError, match=f"{name} must be .* got None"):
            operator(*call, **option)
    with pytest.raises(ValueError, match=f"{name} must be .* got None"):
        torch_rpa.ragged_paged_attention(*call, **option)
    if before is not None:
        assert torch.equal(raw_bytes(call.kv_cache), before)


def test_inputs_may_be_views():
    call, expected_call = make_call(), make_call()
    assert call.k is not None
    wide = torch.stack([call.q, call.q], dim=1)
    call = call._replace(
        q=wide[:, 0], k=call.k.transpose(0, 1).contiguous().transpose(0, 1)
    )
    out = ops.ragged_paged_attention(*call)
    assert torch.equal(out, ops.ragged_paged_attention(*expected_call))
    assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(expected_call.kv_cache))
