"""Block sizes and tuned records of users: which kernel is lowered, and when anew."""

import pytest
import torch

import torch_rpa
from jax_kernels import tuned
from tests.torch_rpa.calls import make_call, raw_bytes, to_device
from torch_rpa import ops

BLOCKS = (64, 32, 64)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """As in a new process without files of users."""
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "_users", None)


@pytest.mark.parametrize(
    "block_sizes",
    [(128,), (128, 64, 96), (128, 64, 0), (128, 64, -64), (True, 64, 64), 128, "abc"],
)
def test_other_block_sizes_are_an_error_by_name(block_sizes):
    with pytest.raises(ValueError, match=r"block_sizes must be three powers of two"):
        torch_rpa.ragged_paged_attention(*make_call(), block_sizes=block_sizes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_check_block_sizes_too(device):
    call = to_device(make_call(), device)
    with pytest.raises(ValueError, match=r"block_sizes must be .* got \[3, 64, 64\]"):
        ops.ragged_paged_attention(*call, block_sizes=[3, 64, 64])


@pytest.mark.parametrize("impl", [None, "reference"])
def test_they_have_no_effect_on_cpu_tensors(impl):
    call, expected_call = make_call(), make_call()
    expected = torch_rpa.ragged_paged_attention(*expected_call, impl=impl)
    out = torch_rpa.ragged_paged_attention(*call, impl=impl, block_sizes=BLOCKS)
    assert torch.equal(out, expected)
    assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(expected_call.kv_cache))


# ---- lowered for a TPU


@pytest.fixture
def kernels(monkeypatch):
    """The block sizes of the kernels that are lowered, all for a v6e."""
    pytest.importorskip("torch_xla")
    from jax_kernels.ragged_paged_attention import api
    from torch_rpa.bridges import lowering
    from torch_rpa.bridges import torch_xla as xla_bridge

    lowered = []
    launch = api.launch_lib.launch

    def recorded(scalars, inputs, config, **kwargs):
        decode, mixed = config.phases
        lowered.append((decode.block_kv, mixed.block_q, mixed.block_kv))
        return launch(scalars, inputs, config, **kwargs)

    monkeypatch.setattr(api.launch_lib, "launch", recorded)
    with xla_bridge.lowering_target(lowering.Target("tpu", "v6e", "pallas")):
        yield lowered


def lower(soft_cap: float, **options) -> None:
    """Calls the operator; ``soft_cap`` tells signatures of the tests apart."""
    import torch_xla

    call = make_call(page_size=64, device=torch_xla.device())
    ops.ragged_paged_attention_functional(*call, soft_cap=soft_cap, **options)
    torch_xla._XLAC._clear_pending_irs(str(torch_xla.device()))


def record(size: int) -> tuned.TunedBlocks:
    """For the shape of ``make_call``."""
    return tuned.TunedBlocks(
        chip="v6e",
        phase="decode",
        shape=tuned.TunedShape("float32", "bfloat16", 4, 2, 128, 64),
        blocks={"decode_block_kv": size},
        default_blocks={"decode_block_kv": size},
        kind="measurement",
        cycles={"step": 1},
        default_cycles={"step": 1},
        versions={},
    )


def test_block_sizes_reach_the_kernel_and_are_part_of_the_signature(kernels):
    for sizes in (BLOCKS, list(BLOCKS), (32, 32, 32)):
        lower(41.0, block_sizes=sizes)
    assert kernels == [BLOCKS, (32, 32, 32)]


@pytest.mark.slow
def test_records_of_users_reach_the_kernel_and_lower_it_anew_once(kernels, tmp_path):
    path = tmp_path / "mine.json"
    tuned.save(path, [record(128)])
    lower(42.0)
    for _ in range(2):
        with torch_rpa.tuned_block_sizes(path):
            lower(42.0)
        lower(42.0)
    assert len(kernels) == 2  # the second time both are known
    assert kernels[1][0] == 128 != kernels[0][0]
    with torch_rpa.tuned_block_sizes(path):
        lower(42.0, block_sizes=BLOCKS)
    assert kernels[2] == BLOCKS


def test_files_of_the_environment_reach_the_kernel(kernels, monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    tuned.save(path, [record(128)])
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(path))
    lower(43.0)
    assert kernels[0][0] == 128


def test_a_wrong_file_is_an_error_by_name(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json"):
        with torch_rpa.tuned_block_sizes(path):
            pass
