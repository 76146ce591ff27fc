"""Heads sharded over four devices; run by test_spmd.py in a process of its own.

SPMD mode belongs to a process, so these tests cannot share one with the others.
"""

import functools
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

import torch_rpa
from tests.support.snippets import all_snippets
from tests.torch_rpa.calls import assert_same_up_to_rounding, make_call, to_device
from tests.torch_rpa.test_context_parallel import striped_caches
from tests.torch_rpa.tpu_compiler import compile_for_tpu, graph_of
from torch_rpa import context_parallel as cp
from torch_rpa import ops, spmd
from torch_rpa.bridges import torch_xla as xla_bridge

xr.use_spmd()
HQ, HKV, DEVICES = 8, 4, 4
HEADS = (None, "model", None, None, None)


def mesh_of(**sizes):
    shape = tuple(sizes.values())
    return xs.Mesh(np.arange(DEVICES), shape, tuple(sizes))


MESHES = {"4": mesh_of(model=4), "2x2": mesh_of(data=2, model=2)}


def sharded_copy(call, mesh):
    """The cache of a call on the devices, the heads of each one side by side."""
    size, head_dim = mesh.shape()["model"], call.q.shape[-1]
    cache = call.kv_cache
    if head_dim > 64:
        rows = cache.unflatten(1, (2, size, HKV // size))
        cache = rows.transpose(1, 2).flatten(1, 3)
    cache = cache.to(torch_xla.device())
    xs.mark_sharding(cache, mesh, HEADS)
    return cache


def per_head(cache, call, mesh):
    """The keys and values of a sharded cache, joined from what each device holds."""
    size, head_dim = mesh.shape()["model"], call.q.shape[-1]
    shards = xs.wrap_if_sharded(cache).local_shards
    parts = [torch_rpa.unpack_kv_cache(s.data, HKV // size, head_dim) for s in shards]
    return torch.cat(parts[:size], dim=2)


def count(name):
    data = metrics.metric_data(name)
    return data[0] if data else 0


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize(
    ("head_dim", "cache_dtype", "sinks"),
    [(128, torch.float32, False), (64, torch.bfloat16, True)],
)
def test_values_and_caches_are_those_of_one_device(mesh, head_dim, cache_dtype, sinks):
    call = make_call(
        num_q_heads=HQ,
        num_kv_heads=HKV,
        head_dim=head_dim,
        cache_dtype=cache_dtype,
        sinks=sinks,
    )
    cache = sharded_copy(call, mesh)
    spec = torch_xla._XLAC._get_xla_sharding_spec(cache)
    moved = to_device(call, torch_xla.device())._replace(kv_cache=cache)
    torch_xla.sync(wait=True)
    metrics.clear_all()
    scales: dict[str, Any] = {}
    if sinks:
        scales = {
            "k_scale": 1 / torch.arange(1.0, 1 + HKV),
            "v_scale": torch.tensor(3.0),
        }
    there = {name: scale.to(torch_xla.device()) for name, scale in scales.items()}
    torch_xla.sync(wait=True)
    for _ in range(3):
        expected = torch_rpa.ragged_paged_attention(*call, sm_scale=0.1, **scales)
        out = spmd.sharded_ragged_paged_attention(
            *moved, mesh=mesh, sm_scale=0.1, **there
        )
        torch_xla.sync(wait=True)
        assert_same_up_to_rounding(out, expected)
        assert torch_xla._XLAC._get_xla_sharding_spec(cache) == spec
        keys_and_values = torch_rpa.unpack_kv_cache(call.kv_cache, HKV, head_dim)
        assert torch.equal(per_head(cache, call, mesh), keys_and_values)
    # On each device the cache takes over the buffer of its parameter.
    aliased = [number for _, number in metrics.metric_data("InputOutputAliasCount")[2]]
    assert sum(aliased) == 1


@pytest.mark.filterwarnings("ignore:XLA_USE_SPMD is being deprecated")  # it is on
def test_the_fragment_of_the_readme_runs_with_the_names_it_is_given():
    (fragment,) = [s for s in all_snippets("python") if "use_spmd" in s.code]
    call = make_call(num_q_heads=HQ, num_kv_heads=HKV)
    q, k, v, _, *batch = to_device(call, torch_xla.device())[:8]
    known = {"q": q, "k": k, "v": v, "batch": batch}
    known |= {"N": call.kv_cache.shape[0], "page_size": 8, "Hkv": HKV, "D": 128}
    assert fragment.given is not None
    names = {name: known[name] for name in fragment.given}
    exec(fragment.code, names)
    torch_xla.sync()
    # The cache held zeros.
    empty = call._replace(kv_cache=torch.zeros_like(call.kv_cache))
    expected = ops.ragged_paged_attention(*empty, sm_scale=128**-0.5)
    assert_same_up_to_rounding(names["out"], expected)


def test_a_cache_that_is_only_read_is_left_alone():
    call = make_call(num_q_heads=HQ, num_kv_heads=HKV, head_dim=64)
    cache = sharded_copy(call, MESHES["4"])
    scales = torch.arange(1.0, 1 + HKV)
    expected = ops.WITH_LSE.public(*call, update_kv_cache=False, k_scales=scales)
    metadata = [t.to(torch_xla.device()) for t in call[4:8]]
    results = spmd.sharded_ragged_paged_attention(
        call.q.to(torch_xla.device()),
        None,
        None,
        cache,
        *metadata,
        mesh=MESHES["4"],
        k_scale=scales.to(torch_xla.device()),
        update_kv_cache=False,
        return_lse=True,
    )
    torch_xla.sync()
    assert_same_up_to_rounding(results[0], expected[0])
    live = slice(0, int(call.cu_q_lens[int(call.distribution[2])]))
    assert_same_up_to_rounding(results[1][live], expected[1][live])


def test_an_empty_cache_is_zeros_in_shards():
    cache = spmd.empty_sharded_kv_cache(5, 8, HKV, 128, mesh=MESHES["4"])
    torch_xla.sync(wait=True)
    shards = [shard.data for shard in xs.wrap_if_sharded(cache).local_shards]
    shape = torch_rpa.kv_cache_shape(5, 8, HKV // DEVICES, 128, torch.bfloat16)
    assert [shard.shape for shard in shards] == [torch.Size(shape)] * DEVICES
    assert not any(shard.any() for shard in shards)


def test_what_cannot_be_sharded_is_refused():
    call = make_call(num_q_heads=HQ, num_kv_heads=HKV, device=torch_xla.device())
    attention = functools.partial(
        spmd.sharded_ragged_paged_attention, *call, mesh=MESHES["4"]
    )
    with pytest.raises(ValueError, match=r"kv_cache must be sharded .*empty_sharded"):
        attention()
    with pytest.raises(ValueError, match=r"one of \['model'\] of mesh, got 'heads'"):
        attention(axis="heads")
    scales = torch.ones(HQ, device=torch_xla.device())
    with pytest.raises(ValueError, match=r"k_scale must .* \[Hkv\] = \[4\], got .*8"):
        attention(k_scale=scales)
    with pytest.raises(ValueError, match="k_scale must be given once, got tensors as"):
        attention(k_scale=scales, k_scales=scales)
    with pytest.raises(ValueError, match=r"multiple of the 4 devices .* got 6"):
        spmd.empty_sharded_kv_cache(5, 8, 6, 128, mesh=MESHES["4"])


def shard_llama(model, mesh):
    """Splits the products by heads and by hidden units, as is usual."""
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            xs.mark_sharding(
                getattr(layer.self_attn, name).weight, mesh, ("model", None)
            )
        for name in ("gate_proj", "up_proj"):
            xs.mark_sharding(getattr(layer.mlp, name).weight, mesh, ("model", None))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            xs.mark_sharding(linear.weight, mesh, (None, "model"))


@torch.no_grad()
def test_a_sharded_llama_of_transformers_gives_the_logits_of_eager_attention():
    from transformers import AutoModelForCausalLM, LlamaConfig

    from torch_rpa.transformers import RaggedBatch, RPAContext, use_rpa

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HQ,
        num_key_value_heads=HKV,
        head_dim=32,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    tokens = torch.randint(0, 64, (1, 14))
    expected = model(tokens, use_cache=False).logits

    mesh = MESHES["4"]
    model = use_rpa(model).to(torch_xla.device())
    shard_llama(model, mesh)
    caches = [
        spmd.empty_sharded_kv_cache(2, 8, HKV, 32, mesh=mesh, dtype=torch.float32)
        for _ in range(2)
    ]
    torch_xla.sync(wait=True)
    specs = [torch_xla._XLAC._get_xla_sharding_spec(cache) for cache in caches]
    attention = functools.partial(spmd.sharded_ragged_paged_attention, mesh=mesh)
    # Powers of two, by which keys and values stay exact: [layers, Hkv].
    scales = (2.0 ** torch.arange(-HKV, HKV)).view(2, HKV).to(torch_xla.device())
    metrics.clear_all()
    got = []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 13), (13, 14)):
        tensors = ([stop], [1, 0], [0, stop - start], [0, 0, 1])
        batch = RaggedBatch(
            *(torch.tensor(t).int().to(torch_xla.device()) for t in tensors)
        )
        logits = model(
            input_ids=tokens[:, start:stop].to(torch_xla.device()),
            position_ids=torch.arange(start, stop)[None].to(torch_xla.device()),
            use_cache=False,
            rpa=RPAContext(
                caches, batch, k_scale=scales, v_scale=[*scales], attention=attention
            ),
        ).logits
        torch_xla.sync()
        got.append(logits.cpu())
    # Both sum in float32, in different orders.
    bound = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (torch.cat(got, dim=1) - expected).abs().max() <= bound
    assert [torch_xla._XLAC._get_xla_sharding_spec(c) for c in caches] == specs
    assert count("InputOutputAliasCount") >= 2
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_a_graph_for_four_tpus_exchanges_no_part_of_the_cache():
    """Two layers with products sharded around them, as in a model."""
    mesh, device = MESHES["4"], torch_xla.device()
    call = make_call(
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        page_size=128,
        num_pages=256,
        dtype=torch.bfloat16,
        device=device,
    )
    caches = [
        spmd.empty_sharded_kv_cache(256, 128, 8, 128, mesh=mesh) for _ in range(2)
    ]
    split = torch.randn(256, 48 * 128, dtype=torch.bfloat16).to(device)
    join = torch.randn(32 * 128, 256, dtype=torch.bfloat16).to(device)
    xs.mark_sharding(split, mesh, (None, "model"))
    xs.mark_sharding(join, mesh, ("model", None))
    hidden = torch.randn(24, 256, dtype=torch.bfloat16).to(device)
    torch_xla.sync(wait=True)
    target = xla_bridge.Target("tpu", "v6e", "pallas")
    with xla_bridge.lowering_target(target):
        for cache in caches:
            heads = (hidden @ split).unflatten(1, (8, 6, 128))
            q = heads[:, :, :4].flatten(1, 2)
            out = spmd.sharded_ragged_paged_attention(
                q, heads[:, :, 4], heads[:, :, 5], cache, *call[4:8], mesh=mesh
            )
            hidden = hidden + out.flatten(1) @ join
    outputs = [hidden, *caches]
    graph = graph_of(sorted(outputs, key=torch_xla._XLAC._xla_get_tensor_id))
    compiled = compile_for_tpu(graph, "v6e", "256x16x64x2x128xbf16", DEVICES)
    torch_xla._XLAC._clear_pending_irs(str(device))

    # Each device holds 2 of the 8 key heads, aliased through both kernels.
    shard_bytes = caches[0].numel() * 2 // DEVICES
    assert compiled.num_aliased_parameters == 2
    assert compiled.memory.alias_size_in_bytes == 2 * shard_bytes
    assert compiled.memory.temp_size_in_bytes < shard_bytes // 8
    passing_on = {"parameter", "get-tuple-element", "bitcast"}
    assert set(compiled.operations_producing("bf16[256,4,64,2,128]")) <= passing_on
    assert compiled.operations_producing("bf16[256,16,64,2,128]") == []
    assert len(compiled.kernel_calls) >= 2
    for line in compiled.kernel_calls:
        assert "output_to_operand_aliasing" in line
    # What is exchanged: the sums of the products after each layer.
    assert list(compiled.collectives) == ["all-reduce"]
    shapes = [shape.split("{")[0] for shape in compiled.collectives["all-reduce"]]
    assert shapes == ["bf16[24,256]"] * 2


# ---- stripes of the context


def striped_step(call, pages, new_page_size):
    return cp.plan_striped_step(
        call.kv_lens.cpu(),
        pages,
        call.cu_q_lens.cpu(),
        call.distribution.cpu(),
        num_devices=DEVICES,
        num_tokens=len(call.q),
        new_page_size=new_page_size,
    ).to(torch_xla.device())


def test_stripes_of_four_devices_give_the_values_of_one():
    """Decodes, then prefill, by one program, in which both caches stay in place."""
    metrics.clear_all()
    for lengths in ([(1, 13), (1, 1), (1, 30)], [(9, 9), (7, 30)]):
        check_stripes(lengths)
    counts = [number for _, number in metrics.metric_data("InputOutputAliasCount")[2]]
    assert sum(counts) == 2


def check_stripes(lengths):
    mesh, device = mesh_of(context=4), torch_xla.device()
    call = make_call(lengths, cache_dtype=torch.float32, sinks=True)
    stripes, pages = striped_caches(call, lengths, DEVICES)
    cache = torch.cat(stripes).nan_to_num().to(device)
    xs.mark_sharding(cache, mesh, ("context", None, None, None, None))
    spec = torch_xla._XLAC._get_xla_sharding_spec(cache)
    num_pages = cp.num_new_pages(len(call.q), len(call.kv_lens), 8)
    new_cache = torch_rpa.empty_kv_cache(
        num_pages, 8, 2, 128, dtype=torch.float32, device=device
    )
    step = striped_step(call, pages, 8)
    moved: Any = to_device(call, device)
    torch_xla.sync(wait=True)
    expected = ops.WITH_LSE.public(*call, sm_scale=0.1)
    got = cp.context_parallel_attention(
        moved.q,
        moved.k,
        moved.v,
        cache,
        new_cache,
        step,
        moved.sinks,
        mesh=mesh,
        sm_scale=0.1,
        return_lse=True,
    )
    torch_xla.sync(wait=True)
    live = slice(0, int(call.cu_q_lens[len(lengths)]))
    for a, b in zip(got, expected, strict=True):
        assert_same_up_to_rounding(a[live], b[live])
    assert torch_xla._XLAC._get_xla_sharding_spec(cache) == spec
    after, _ = striped_caches(call, [(0, kv) for _, kv in lengths], DEVICES)
    shards = [shard.data for shard in xs.wrap_if_sharded(cache).local_shards]
    for shard, right in zip(shards, after, strict=True):
        assert torch.equal(shard, right.nan_to_num())


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_a_graph_for_four_tpus_exchanges_outputs_and_no_keys():
    mesh, device = mesh_of(context=4), torch_xla.device()
    call = make_call(
        [(1, 30)] * 4,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        page_size=128,
        num_pages=256,
        dtype=torch.bfloat16,
    )
    cache = cp.empty_striped_kv_cache(256, 128, 8, 128, mesh=mesh)
    new_cache = torch_rpa.empty_kv_cache(
        cp.num_new_pages(24, 5, 128), 128, 8, 128, device=device
    )
    step = striped_step(call, call.page_indices, 128)
    q, k, v = to_device(call, device)[:3]
    assert k is not None and v is not None
    torch_xla.sync(wait=True)
    with xla_bridge.lowering_target(xla_bridge.Target("tpu", "v6e", "pallas")):
        out = cp.context_parallel_attention(q, k, v, cache, new_cache, step, mesh=mesh)
    outputs = [out, cache, new_cache]
    graph = graph_of(sorted(outputs, key=torch_xla._XLAC._xla_get_tensor_id))
    compiled = compile_for_tpu(graph, "v6e", "1024x16x64x2x128xbf16", DEVICES)
    torch_xla._XLAC._clear_pending_irs(str(device))

    stripe_bytes = cache.numel() * 2 // DEVICES
    assert compiled.memory.alias_size_in_bytes >= stripe_bytes
    assert compiled.memory.temp_size_in_bytes < stripe_bytes // 8
    passing_on = {"parameter", "get-tuple-element", "bitcast"}
    assert set(compiled.operations_producing("bf16[256,16,64,2,128]")) <= passing_on
    assert compiled.operations_producing("bf16[1024,16,64,2,128]") == []
    assert len(compiled.kernel_calls) == 3
    # What is exchanged: maxima, sums, and weighted outputs.
    assert list(compiled.collectives) == ["all-reduce"]
    shapes = [shape.split("{")[0] for shape in compiled.collectives["all-reduce"]]
    assert shapes == ["f32[24,32]", "f32[24,32]", "bf16[24,32,128]"]


def test_stripes_refuse_another_step_and_gradients():
    device = torch_xla.device()
    mesh, call = mesh_of(context=4), make_call()
    cache = cp.empty_striped_kv_cache(32, 8, 2, 128, mesh=mesh)
    new_cache = torch_rpa.empty_kv_cache(8, 8, 2, 128, device=device)
    step = striped_step(call, call.page_indices, 8)
    q, k, v = to_device(call, device)[:3]
    assert k is not None and v is not None
    attend = functools.partial(cp.context_parallel_attention, mesh=mesh)
    with pytest.raises(ValueError, match=r"planned for the 20 rows of q, got .* 24"):
        attend(q[:20], k[:20], v[:20], cache, new_cache, step)
    with pytest.raises(ValueError, match=r"new_cache must be bfloat16 \[8, 4, 4, 2"):
        attend(q, k, v, cache, new_cache[:7], step)
    with pytest.raises(ValueError, match=r"planned for the 4 devices .* one for 2"):
        attend(q, k, v, cache, new_cache, step.map(cp.STRIPED, lambda x: x[:2]))
    with pytest.raises(NotImplementedError, match="no backward"):
        attend(q.clone().requires_grad_(), k, v, cache, new_cache, step)
