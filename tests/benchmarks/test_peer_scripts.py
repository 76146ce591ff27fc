"""The scripts that run in the environments of peers, with stand-ins for the peers."""

import contextlib
import importlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks import published
from benchmarks.peers import calls, environments, prediction
from benchmarks.peers.calls import PeerCall
from benchmarks.tpu_timing.workloads import parse_sequences


def request_of(lengths, **fields):
    call = PeerCall(
        fields.pop("peer", "flywheel"),
        "tpu7x",
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=256,
        sequences=tuple(parse_sequences(lengths)),
        **fields,
    )
    return call.request()


def import_script(monkeypatch, name):
    monkeypatch.syspath_prepend(str(calls.SCRIPTS))
    for module in (name, "here"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def here(monkeypatch):
    return import_script(monkeypatch, "here")


# --- operands of kernels -----------------------------------------------------


def kernel(name, *scalars, x):
    """A Pallas kernel that gets scalars in SMEM."""

    def body(*references):
        references[-1][...] = references[-2][...]

    return pl.pallas_call(
        body,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(1,)
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(*scalars, x)


def test_operands_that_a_function_computes_are_known(here):
    @jax.jit
    def function(x, lens):
        starts = jnp.cumsum(lens)
        return kernel("second", lens * 2, x=kernel("first", starts, x=x))

    lens = np.array([3, 4], np.int32)
    found = here.kernels_of(
        jax.devices()[0], function, here.array("float32", 8, 128), lens
    )
    assert [name for name, _ in found] == ["first", "second"]
    (_, first), (_, second) = found
    assert {k: v.tolist() for k, v in first.items()} == {0: [3, 7]}
    assert {k: v.tolist() for k, v in second.items()} == {0: [6, 8]}


def test_operands_that_depend_on_unknown_values_are_left_out(here):
    def function(x):
        return kernel("one", jnp.arange(3), x[0, :3].astype(int), x=x)

    found = here.kernels_of(jax.devices()[0], function, here.array("float32", 8, 128))
    assert {k: v.tolist() for k, v in found[0][1].items()} == {0: [0, 1, 2]}


def test_a_kernel_in_a_loop_is_refused(here):
    def function(x):
        return jax.lax.fori_loop(0, x.shape[0], lambda _, y: kernel("one", x=y), x)

    with pytest.raises(NotImplementedError, match="outside loops and branches"):
        here.kernels_of(jax.devices()[0], function, here.array("float32", 8, 128))


def test_a_peer_finds_the_chip_that_is_not_there(here, monkeypatch):
    present = jax.devices()
    absent = types.SimpleNamespace(device_kind="TPU7x")
    monkeypatch.setattr(here.jax, "default_device", contextlib.nullcontext)
    with here.as_on(absent):
        assert jax.devices() == [absent]
        assert jax.default_backend() == "tpu"
    assert jax.devices() == present


def test_what_a_script_writes(here, tmp_path, monkeypatch):
    monkeypatch.setattr(here.importlib.metadata, "version", lambda name: f"{name} 1")
    here.write_call(tmp_path, {"a": 1}, [("k", {2: np.array([5])})], ["peer"])
    with np.load(tmp_path / "operands.npz") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"k:2": [5]}
    written = json.loads((tmp_path / "call.json").read_text())
    assert written["kernels"] == ["k"]
    assert written["versions"]["peer"] == "peer 1"


# --- FlyWheel ----------------------------------------------------------------


@pytest.fixture
def flywheel(monkeypatch):
    """The script, with functions in the peer's place that return what they get."""
    stand_in = types.SimpleNamespace(
        flash_attn_func=lambda *a, **options: ("dense", a, options),
        flash_attn_with_kvcache=lambda *a, **options: ("cached", a, options),
    )
    monkeypatch.setitem(sys.modules, "flywheel_tpu", stand_in)
    return import_script(monkeypatch, "compile_flywheel")


def test_fresh_sequences_of_flywheel_are_dense(flywheel):
    call, arguments, options = flywheel.call_of(request_of("2*512/512"))
    assert [a.shape for a in arguments] == [(2, 8, 512, 256), *[(2, 2, 512, 256)] * 2]
    assert call(*arguments)[0] == "dense"
    assert call(*arguments)[2] == {"causal": True}
    assert options == {}


def test_a_window_of_flywheel_counts_the_query_itself(flywheel):
    call, arguments, _ = flywheel.call_of(request_of("512/512", window=128))
    assert call(*arguments)[2]["window_size"] == (127, 0)


@pytest.mark.parametrize("new", [1, 64])
def test_cached_sequences_of_flywheel(flywheel, new):
    request = request_of(f"{new}/300,{new}/512")
    call, arguments, options = flywheel.call_of(request)
    kind, given, keywords = call(*arguments)
    assert kind == "cached"
    assert given[0].shape == (2, new, 8, 256)
    assert given[1].shape == (8, 128, 4, 256)
    assert given[2] is None
    assert keywords["cache_seqlens"].tolist() == [300 - new, 512 - new]
    assert sorted(keywords["block_table"].ravel()) == list(range(8))
    assert options == {"donate_argnums": 1}


@pytest.mark.parametrize(
    ("lengths", "fields", "message"),
    [
        ("1/512,64/512", {}, r"one number of new tokens for all, got \[1, 64\]"),
        ("64/64,64/64", {"blocks": {"block_q": 8}}, "blocks: FlyWheel takes none"),
    ],
)
def test_what_flywheel_does_not_take(flywheel, lengths, fields, message):
    with pytest.raises(NotImplementedError, match=message):
        flywheel.call_of(request_of(lengths, **fields))


# --- splash attention --------------------------------------------------------

KERNEL_MODULE = """
import dataclasses, enum
class QKVLayout(enum.IntEnum):
    HEAD_DIM_MINOR = 1
    SEQ_MINOR = 2
@dataclasses.dataclass
class SplashConfig:
    block_q: int
    q_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    k_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    v_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    use_experimental_scheduler: bool = False
    qk_diag_skip: bool = False
    sv_diag_skip: bool = False
    qk_diag_grid: int = 2
    @classmethod
    def get_default(cls):
        return cls(128)
def make_splash_mha_single_device(mask, config):
    return lambda q, k, v: (mask, config, q, k, v)
"""
MASK_MODULE = """
CausalMask = lambda shape: ("causal", shape)
FullMask = lambda shape: ("full", shape)
LocalMask = lambda shape, window_size, offset: ("local", shape, window_size, offset)
"""


@pytest.fixture
def splash(monkeypatch, tmp_path):
    """The script, with a package in the peer's place."""
    script = import_script(monkeypatch, "compile_splash")
    folder = tmp_path.joinpath(*script.PACKAGE.split("."))
    folder.mkdir(parents=True)
    (tmp_path / "tokamax" / "__init__.py").write_text("raise ImportError('a server')")
    (folder / "splash_attention_kernel.py").write_text(KERNEL_MODULE)
    (folder / "splash_attention_mask.py").write_text(MASK_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: "9")
    yield script
    for name in [n for n in sys.modules if n.split(".")[0] == "tokamax"]:
        del sys.modules[name]


def test_the_configuration_of_splash(splash):
    blocks = {
        "block_q": 256,
        "num_stacked_q_heads": 1,
        "layouts": "hsh",
        "scheduler": 1,
        "diagonal_grid": 4,
    }
    request = request_of("512/512", peer="splash", blocks=blocks, v_head_dim=128)
    call, arguments = splash.call_of(request)
    mask, config, *_ = call(*arguments)
    assert mask == ("causal", (512, 512))
    assert config.block_q == 256
    assert (config.q_layout.name, config.k_layout.name) == (
        "HEAD_DIM_MINOR",
        "SEQ_MINOR",
    )
    assert config.use_experimental_scheduler
    assert (config.qk_diag_skip, config.sv_diag_skip) == (True, True)
    assert config.qk_diag_grid == 4
    assert [a.shape for a in arguments] == [(8, 512, 256), (2, 512, 256), (2, 512, 128)]


def test_published_blocks_are_those_that_splash_takes(splash):
    for cell in published.usable_cells():
        if cell.kernel == "splash" and cell.blocks is not None:
            assert tuple(cell.blocks) == splash.BLOCKS


def test_splash_skips_nothing_of_the_diagonal_unasked(splash):
    request = request_of(
        "8/8", peer="splash", blocks={"block_q": 8, "diagonal_grid": 0}
    )
    call, arguments = splash.call_of(request)
    assert not call(*arguments)[1].qk_diag_skip


def test_the_default_of_splash_is_the_peers(splash):
    call, arguments = splash.call_of(request_of("512/512", peer="splash"))
    assert call(*arguments)[1].block_q == 128


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"causal": False}, ("full", (512, 512))),
        ({"window": 128}, ("local", (512, 512), (127, 0), 0)),
        ({"window": 128, "causal": False}, ("local", (512, 512), (127, None), 0)),
    ],
)
def test_masks_of_splash(splash, fields, expected):
    call, arguments = splash.call_of(request_of("512/512", peer="splash", **fields))
    assert call(*arguments)[0] == expected


def test_several_sequences_of_splash_are_a_batch(splash):
    _, arguments = splash.call_of(request_of("4*512/512", peer="splash"))
    assert [a.shape for a in arguments] == [(4, 8, 512, 256), *[(4, 2, 512, 256)] * 2]


@pytest.mark.parametrize("lengths", ["64/64,128/128", "64/128"])
def test_what_splash_does_not_take(splash, lengths):
    with pytest.raises(NotImplementedError, match="one length without cached tokens"):
        splash.call_of(request_of(lengths, peer="splash"))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"block_x": 1}, r"expected some of block_q, .*got .*'block_x': 1"),
        ({"num_stacked_q_heads": 2}, "tokamax 9 has no num_stacked_q_heads, got"),
    ],
)
def test_blocks_that_splash_does_not_have(splash, blocks, message):
    request = request_of("512/512", peer="splash", blocks={"block_q": 8, **blocks})
    with pytest.raises(ValueError, match=message):
        splash.call_of(request)


def test_a_package_that_is_missing_is_named(here):
    with pytest.raises(ModuleNotFoundError, match="no_such_peer: not installed"):
        here.import_alone("no_such_peer.kernel")


# --- with the peers ----------------------------------------------------------


def installed_call(peer, lengths, **fields):
    try:
        environments.find_python()
    except ValueError as error:
        pytest.skip(str(error))
    sequences = tuple(parse_sequences(lengths))
    return PeerCall(peer, "tpu7x", 4, 2, 128, sequences, **fields)


@pytest.mark.extended
def test_flywheel_from_its_package(tmp_path):
    call = installed_call("flywheel", "512/512")
    found = prediction.predict_call(call, tmp_path)
    assert found.versions["flywheel-tpu"] == "0.3.0"
    assert all("were assumed to be 0" in warning for warning in found.warnings)
    assert found.results[0].bytes_moved["vmem_to_hbm"] == call.ideal.write_bytes


@pytest.mark.extended
def test_splash_from_its_package(tmp_path):
    blocks = {"block_q": 256, "block_kv": 256, "block_kv_compute": 128}
    call = installed_call("splash", "512/512", blocks=blocks)
    found = prediction.predict_call(call, tmp_path)
    assert found.warnings == []
    assert found.versions["tokamax"] == "0.0.15"
    # Of two by two blocks the causal mask hides one.
    assert max(loop.iterations for loop in found.results[0].loops) >= 4 * 3
