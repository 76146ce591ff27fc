"""Published times: that they are read, complete, and agree with themselves."""

import collections
import dataclasses
import itertools

import pytest

from benchmarks import published
from benchmarks.published import Figure
from benchmarks.tpu_timing.workloads import Sequence
from jax_kernels import chips

CELLS = published.cells()
USABLE = published.usable_cells()
KERNELS = {"rpa_v3", "splash", "flywheel"}


def named(part: str) -> published.Cell:
    (found,) = [cell for cell in CELLS if part in cell.name]
    return found


def test_no_cell_stands_twice():
    names = collections.Counter(cell.name for cell in CELLS)
    assert [name for name, count in names.items() if count > 1] == []
    # Nor under another name: the same program and lengths of the same source.
    programs = collections.Counter(
        repr(dataclasses.replace(cell, name="", figure=Figure("0", "us"), also=()))
        for cell in CELLS
    )
    assert max(programs.values()) == 1


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_is_complete(cell):
    source = cell.source
    assert all((source.author, source.document, source.date, source.method))
    assert source.address.startswith("https://")
    assert source.clock in ("locked", "default", "not stated")
    assert cell.kernel in KERNELS
    assert cell.chip in chips.COMPILED
    assert cell.num_q_heads % cell.num_kv_heads == 0
    assert cell.dtype in published.ITEM_BYTES
    assert (cell.blocks is None) == (cell.blocks_are != published.STATED)
    assert (cell.page_size is None) == (cell.kernel == "splash" or not paged(cell))
    if cell.page_size is not None and cell.blocks is not None:
        kv_block = cell.blocks[{"rpa_v3": "bkv_sz"}.get(cell.kernel, "block_kv")]
        assert isinstance(kv_block, int)
        assert kv_block % cell.page_size == 0
    low, high = cell.microseconds_interval
    assert 0 < low < cell.microseconds < high
    # No more than 4 % of doubt by rounding.
    assert high / low < 1.04


def paged(cell: published.Cell) -> bool:
    return cell.kernel == "rpa_v3" or "cache" in cell.source.document


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if cell.also], ids=lambda cell: cell.name
)
def test_figures_of_one_time_agree(cell):
    amounts = {"tflops": cell.half_square_operations, "tb_per_s": cell.cache_bytes}
    first, last = cell.microseconds_interval
    for figure in cell.also:
        low, high = figure.interval
        amount = amounts[figure.unit]
        assert low <= amount / (first * 1e6)
        assert amount / (last * 1e6) <= high


def test_no_time_is_shorter_than_the_peaks_allow():
    for cell in CELLS:
        rates = chips.COMPILED[cell.chip].rates
        seconds = cell.microseconds / 1e6
        if cell.window is None:
            assert cell.half_square_operations < seconds * rates.bf16_flops_per_s
            assert cell.cache_bytes < seconds * rates.hbm_bytes_per_s
        assert cell.transposed_bytes < seconds * rates.hbm_bytes_per_s


def test_longer_sequences_run_at_a_higher_rate():
    """A slip in copying a table would show."""
    prefills = [c for c in CELLS if "prefill" in c.kind and len(c.steps) == 1]
    for _, group in itertools.groupby(
        prefills,
        key=lambda c: (c.source, c.kernel, c.num_kv_heads, c.head_dim, c.causal),
    ):
        for one, next_one in itertools.pairwise(group):
            work = next_one.half_square_operations / one.half_square_operations
            faster = work / (next_one.microseconds / one.microseconds)
            assert 0.97 < faster < 2.2, (one.name, next_one.name)


def test_a_rate_is_a_time_by_the_count_of_its_source():
    cell = named("rpa_v3 tpu7x 32/4x256 8192/8192 ")
    operations = 4 * 8192**2 / 2 * 32 * 256
    assert cell.half_square_operations == operations
    assert cell.microseconds == pytest.approx(operations / 448e12 * 1e6)
    assert cell.microseconds_interval == pytest.approx(
        (operations / 448.5e12 * 1e6, operations / 447.5e12 * 1e6)
    )
    assert cell.blocks == {
        "bq_sz": 256,
        "bkv_sz": 2048,
        "bq_csz": 128,
        "bkv_csz": 512,
    }


def test_calls_in_chunks_are_summed():
    cell = named("rpa_v3 tpu7x 32/4x256 16384 by 1024 ")
    assert len(cell.steps) == 16
    assert cell.steps[1] == (Sequence(1024, 2048),)
    assert cell.half_square_operations == 4 * 16384**2 / 2 * 32 * 256
    assert cell.microseconds == 11860


def test_bytes_of_the_transposes():
    cell = named("splash tpu7x 32/8x128 32*4096/4096 ")
    tokens = 32 * 4096
    assert cell.transposed_bytes == 2 * tokens * 128 * 2 * (32 + 32 + 8 + 8)
    assert named("splash tpu7x 32/8x128 4096/4096 ").transposed_bytes == 0


def test_values_that_stay_in_vmem_are_read_but_not_written():
    tokens = 16 * 1024
    cell = named("splash v6e 16/16x128 16*1024/1024 ")
    assert cell.transposed_bytes == 7 * tokens * 128 * 2 * 16


@pytest.mark.parametrize(
    ("text", "interval"),
    [("448", (447.5, 448.5)), ("0.58", (0.575, 0.585)), ("1.6580", (1.65795, 1.65805))],
)
def test_the_digits_of_a_figure_give_its_doubt(text, interval):
    assert Figure(text, "ms").interval == pytest.approx(interval)


def test_there_are_enough_cells_of_every_kernel_and_kind():
    known = [cell for cell in USABLE if cell.program_known]
    assert len(known) >= 30
    kinds = collections.Counter((cell.kernel, cell.kind) for cell in known)
    for kernel in KERNELS:
        assert kinds[kernel, "prefill-256"] >= 10
        assert kinds[kernel, "short"] >= 1
    assert kinds["rpa_v3", "decode"] >= 3
    assert kinds["splash", "prefill-128"] >= 10


def test_about_a_third_of_each_stratum_is_held_back():
    assert not any(cell.held_back for cell in CELLS if cell.unusable is not None)
    strata = collections.defaultdict(list)
    for cell in USABLE:
        strata[cell.kernel, cell.chip, cell.kind].append(cell.held_back)
    for held in strata.values():
        assert sum(held) == (len(held) + 1) // 3
    assert 0.25 < sum(map(sum, strata.values())) / len(USABLE) < 0.4


def test_unknown_sources_and_missing_figures_are_refused(tmp_path, monkeypatch):
    text = published.FILE.read_text()
    broken = tmp_path / "published.toml"
    monkeypatch.setattr(published, "FILE", broken)
    read = published.cells.__wrapped__
    broken.write_text(text.replace('source = "tokamax_tuning"', 'source = "x"', 1))
    with pytest.raises(ValueError, match=r"source: expected one of .* got 'x'"):
        read()
    broken.write_text(text.replace(', tflops = "274"', "", 1))
    with pytest.raises(ValueError, match="expected one of ms, us and tflops"):
        read()
