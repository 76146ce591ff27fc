"""What test_operator.py runs on a compile-only TPU; prints JSON.

python -m tests.support.compile_only_tpu -m tests.torch_tpu.operator_cases CASE ...

The programs of a case come after the mark of the case: a copy of a tensor to the device
whose length nothing else has.
"""

import copy
import os
import sys
import warnings
from typing import Any

import torch
from torch._dynamo.exc import TorchRuntimeError

import torch_rpa
from jax_kernels.tuned import applied
from tests.torch_rpa.calls import Call, make_call, to_device
from tests.torch_tpu.sections import run_cases
from tests.torch_tpu.tuned_record import tuned_record
from torch_rpa import bridges, ops, validation
from torch_rpa.bridges import torch_tpu_launch

NUM_LAYERS = 2
# Over 128 MiB: more than the vector memory of any chip. A smaller cache XLA moves there
# and back, which reads like copies.
PAGES, PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 10_000, 16, 8, 2, 128
CACHE_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8")
OPTIONS: dict[str, Any] = {"sm_scale": HEAD_DIM**-0.5}


def decode_batch(kv_len: int, sequences: int = 4) -> list[torch.Tensor]:
    pages = torch.arange(sequences * 32, dtype=torch.int32)
    host = [
        torch.full((sequences,), kv_len, dtype=torch.int32),
        pages,
        torch.arange(sequences + 1, dtype=torch.int32),
        torch.tensor([sequences, sequences, sequences], dtype=torch.int32),
    ]
    return [tensor.to("tpu") for tensor in host]


def layers(cache_dtype: torch.dtype = torch.bfloat16, tokens: int = 4):
    def zeros(heads: int) -> torch.Tensor:
        return torch.zeros(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device="tpu")

    return [
        (
            zeros(HEADS),
            zeros(KV_HEADS),
            zeros(KV_HEADS),
            torch_rpa.empty_kv_cache(
                PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=cache_dtype, device="tpu"
            ),
        )
        for _ in range(NUM_LAYERS)
    ]


def step(qkv_caches, batch):
    """A model of two layers, of attention only."""
    return sum(
        torch.ops.rpa.ragged_paged_attention(*tensors, *batch, **OPTIONS)
        for tensors in qkv_caches
    )


def decode_compiled():
    """50 decode steps of changing lengths under torch.compile."""
    return _decode(torch.compile(step, backend="tpu", fullgraph=True), 50)


def decode_eager():
    """Steps that run at once."""
    return _decode(step, 5)


def _decode(function, steps):
    tensors = layers()
    for kv_len in range(1, steps + 1):
        function(tensors, decode_batch(kv_len))
    torch.accelerator.synchronize()
    bridge: Any = bridges.find("tpu")
    launchers = bridge._launchers.values()
    return {"launchers": sorted({launch.__qualname__ for launch in launchers})}


def views():
    """Warnings by kind of cache, run at once and compiled."""
    (q, k, v, cache), (_, _, _, second) = layers()
    stacked = torch.zeros(2, *cache.shape, dtype=cache.dtype, device="tpu")
    batch = decode_batch(3)
    caches = {
        "whole": second.flatten().view(cache.shape),
        "one of a stack": stacked[1],
        "the first pages": cache[: PAGES // 2],
    }

    def attend(q, k, v, kv_cache, *batch):
        return torch.ops.rpa.ragged_paged_attention(q, k, v, kv_cache, *batch)

    def attend_to_one(q, k, v, stacked, *batch):
        return attend(q, k, v, stacked[1], *batch)

    found = {}
    for name, kv_cache in caches.items():
        for how in ("eager", "compiled"):
            run = attend
            if how == "compiled":
                torch._dynamo.reset()
                run = torch.compile(attend, backend="tpu", fullgraph=True)
            found[f"{name}, {how}"] = _warnings(run, q, k, v, kv_cache, *batch)
    run = torch.compile(attend_to_one, backend="tpu", fullgraph=True)
    found["one of a stack, sliced in the graph"] = _warnings(
        run, q, k, v, stacked, *batch
    )
    return found


def _warnings(function, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    ours = {str(w.message) for w in caught if "kv_cache" in str(w.message)}
    return sorted(ours)


def features():
    """Every option and cache dtype, through every operator."""
    done = []

    def run(name, operator, call, **options):
        results = operator(*to_device(call, "tpu"), **options)
        for tensor in results if isinstance(results, tuple) else (results,):
            tensor.cpu()
        done.append(name)

    for name in CACHE_DTYPES:
        dtype = getattr(torch, name)
        scales = {} if dtype.itemsize > 1 else {"k_scale": 0.3, "v_scale": 0.7}
        call = make_call(cache_dtype=dtype)
        run(name, ops.ragged_paged_attention, call, **scales)
    call = make_call(dtype=torch.bfloat16, sinks=True)
    run("sinks", ops.ragged_paged_attention, call)
    run(
        "window, soft cap",
        ops.ragged_paged_attention,
        call,
        sliding_window=8,
        soft_cap=30.0,
    )
    run("not causal", ops.ragged_paged_attention, call, causal=False)
    run("output", ops.ragged_paged_attention, call, out_dtype=torch.float32)
    run("block sizes", ops.ragged_paged_attention, call, block_sizes=(32, 32, 32))
    chunks = make_call([(1, 5), (4, 9), (4, 4)])
    run("chunks", ops.ragged_paged_attention, chunks, chunk_prefill_size=4)
    run("functional", ops.ragged_paged_attention_functional, call)
    without = call._replace(k=None, v=None)
    run("read only", ops.ragged_paged_attention, without, update_kv_cache=False)
    run(
        "read only, keys",
        ops.ragged_paged_attention_readonly,
        call,
        update_kv_cache=False,
    )
    quantised = make_call(cache_dtype=torch.float8_e4m3fn)
    scales = {"q_scale": 0.1, "k_scale": 0.3, "v_scale": 0.7}
    run("q_scale", ops.ragged_paged_attention, quantised, **scales)
    tensors = {name: torch.full((2,), scale) for name, scale in scales.items()}
    on_tpu = {name: scale.to("tpu") for name, scale in tensors.items()}
    run("scales of heads", torch_rpa.ragged_paged_attention, quantised, **on_tpu)
    run("head_dim 64", ops.ragged_paged_attention, make_call(head_dim=64))
    shard = make_call(num_q_heads=8, num_kv_heads=1)  # as of a process of eight
    run("one key head", ops.ragged_paged_attention, shard)
    run("lse", ops.WITH_LSE.public, call, attend="cache")
    run("lse, functional", ops.WITH_LSE.functional, call)
    run("lse, read only", ops.WITH_LSE.readonly, call, update_kv_cache=False)
    return done


def mistakes():
    """Messages of wrong calls: on the device, and on the CPU."""
    good: Any = make_call()
    bad: dict[str, tuple[Call, dict[str, Any]]] = {
        "dtype": (good._replace(kv_lens=good.kv_lens.long()), {}),
        "shape": (good._replace(k=good.k[:, :1]), {}),
        "head_dim": (make_call(head_dim=256)._replace(kv_cache=good.kv_cache), {}),
        "missing": (good._replace(k=None), {}),
        "option": (good, {"sliding_window": 0}),
        "half": (good._replace(q=good.q.half(), k=good.k.half(), v=good.v.half()), {}),
        "gradient": (good._replace(q=good.q.clone().requires_grad_()), {}),
    }
    found = {}
    for name, (call, options) in bad.items():
        on_tpu = (
            to_device(call, "tpu")
            if name != "gradient"
            else call._make(
                None
                if t is None
                else t.detach().to("tpu").requires_grad_(t.requires_grad)
                for t in call
            )
        )
        found[name] = [
            _message(torch_rpa.ragged_paged_attention, *tensors, **options)
            for tensors in (on_tpu, call)
        ]
    moved = to_device(good, "tpu")
    for name, mixed in {
        "another device": moved._replace(kv_lens=good.kv_lens),
        "q on another device": moved._replace(q=good.q),
    }.items():
        found[name] = [_message(torch_rpa.ragged_paged_attention, *mixed)]
    return found


def _message(function, *args, **keywords) -> str:
    with torch.enable_grad():
        try:
            function(*args, **keywords)
        except (ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def _attend(*call):
    return ops.ragged_paged_attention(*call)


def copies():
    """Whether a copy of a cache can be read after a call that updates the cache."""
    ways = {
        "clone": torch.Tensor.clone,
        "deepcopy": copy.deepcopy,
        "copy_": lambda cache: torch.empty_like(cache).copy_(cache),
        "computed": lambda cache: torch.cat([cache]),
        "pages": lambda cache: cache[[3, 1]],
        "on the host": torch.Tensor.cpu,
    }
    attend = torch.compile(_attend, backend="tpu")
    found = {}
    for name, way in ways.items():
        for how, run in (("at once", ops.ragged_paged_attention), ("compiled", attend)):
            call = to_device(make_call(), "tpu")
            copied = way(call.kv_cache)
            run(*call)
            torch.accelerator.synchronize()
            try:
                copied.cpu()
                found[f"{name}, {how}"] = "can be read"
            except RuntimeError as error:
                found[f"{name}, {how}"] = str(error)
    return found


def precompiled():
    """The setting of torch that keeps how a graph is called as well."""
    torch._dynamo.reset()  # what is compiled already is not asked
    with torch._dynamo.config.patch(caching_precompile=True):
        try:
            torch.compile(_attend, backend="tpu")(*to_device(make_call(), "tpu"))
        except TorchRuntimeError as error:
            return str(error)
    return "no error"


def values():
    """Checks of the numbers in the metadata, and where they cannot be made."""
    good = make_call()
    page_indices = good.page_indices.clone()
    page_indices[0] = 77
    bad = to_device(good._replace(page_indices=page_indices), "tpu")
    found: dict[str, Any] = {
        "asked for": _message(torch_rpa.ragged_paged_attention, *bad, validate=True)
    }
    os.environ[validation.VALIDATE_ENV] = "1"
    found["environment, first call"] = _message(ops.ragged_paged_attention, *bad)
    ops.ragged_paged_attention(*to_device(good, "tpu"))
    found["environment, known shapes"] = _message(ops.ragged_paged_attention, *bad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(ops.ragged_paged_attention, backend="tpu")(*bad)
    found["compiled"] = [
        str(w.message) for w in caught if "no effect" in str(w.message)
    ]
    del os.environ[validation.VALIDATE_ENV]
    return found


def opcheck():
    """torch's checks of a custom operator, those that look at no values."""
    call = to_device(make_call(sinks=True), "tpu")
    tests = ("test_autograd_registration", "test_faketensor")
    options: dict[str, Any] = {"sm_scale": 0.1, "sliding_window": 4}
    results = {}
    for operator, extra in (
        (ops.ragged_paged_attention, {}),
        (ops.ragged_paged_attention_functional, {}),
        (ops.ragged_paged_attention_readonly, {"update_kv_cache": False}),
    ):
        results[str(operator)] = torch.library.opcheck(
            operator, tuple(call), options | extra, test_utils=tests
        )
    return results


def reference_calls():
    """Calls of the plain computation, and their options."""
    scales = {"sm_scale": 0.11, "k_scale": 0.3, "v_scale": 0.7}
    chunks = make_call([(1, 5), (4, 9), (4, 4)])
    float8 = make_call(cache_dtype=torch.float8_e4m3fn, num_q_heads=6)
    without = make_call()._replace(k=None, v=None)
    return [
        (make_call(), {}),
        (chunks, {"chunk_prefill_size": 4, "sm_scale": 0.09}),
        (make_call(sinks=True), {"sliding_window": 7, "soft_cap": 11.0}),
        (float8, scales),
        (make_call(cache_dtype=torch.int8, head_dim=48), scales | {"causal": False}),
        (without, {"update_kv_cache": False, "sm_scale": 0.13}),
    ]


def reference():
    """The plain computation."""
    for call, options in reference_calls():
        on_tpu = to_device(call, "tpu")
        torch_rpa.ragged_paged_attention(*on_tpu, **options, impl="reference")


def tuned():
    """Calls before, in and after a block of tuned records, and in it once more."""
    call = to_device(make_call(dtype=torch.bfloat16, pages_per_seq=64), "tpu")
    record = tuned_record()
    for records in ([], [record], [], [record]):
        with applied(records):
            ops.ragged_paged_attention(*call, sm_scale=0.25)


def _returns_cache(operator) -> bool:
    return len(operator._opoverload._schema.returns) == 2


def defaults():
    """Defaults that are given, and left out."""
    call = to_device(make_call(), "tpu")
    for _ in range(2):
        ops.ragged_paged_attention(*call, sm_scale=0.375)
        ops.ragged_paged_attention(*call, sm_scale=0.375, causal=True)
        torch_rpa.ragged_paged_attention(*call, sm_scale=0.375)
        torch.accelerator.synchronize()


def ways():
    """A call as the operator of TorchTPU, the short way, and through that operator.

    The functional operators leave the cache, so that all are given the same buffers.
    """
    call = to_device(make_call(), "tpu")
    without = call._replace(k=None, v=None)
    bridge: Any = bridges.find("tpu")
    launchers, operators = bridge._launchers, bridge._operators
    launchers.clear()

    def run():
        options = {"sm_scale": 0.75}
        ops.ragged_paged_attention_functional(*call, **options)
        options["update_kv_cache"] = False
        ops.ragged_paged_attention_readonly(*without, **options)
        return sorted({launch.__qualname__ for launch in launchers.values()})

    known = set(operators)
    run()
    names = [run()]
    made = [operators[name] for name in set(operators) - known]
    for signature in launchers:
        has_keys = signature[5] is not None  # after four of options, and q
        (operator,) = (op for op in made if _returns_cache(op) == has_keys)
        launchers[signature] = torch_tpu_launch.through(operator)
    names.append(run())
    launchers.clear()
    return names


CASES = {
    function.__name__: function
    for function in (
        decode_compiled,
        decode_eager,
        views,
        features,
        mistakes,
        copies,
        precompiled,
        values,
        opcheck,
        reference,
        tuned,
        ways,
        defaults,
    )
}

if __name__ == "__main__":
    with torch.no_grad():
        run_cases(CASES, sys.argv[1:])
