"""The operator on ``tpu`` tensors: its programs, and what is compiled and copied when.

Values are zeros on the compile-only TPU. What the kernel computes is proven in its
interpret mode, and what the operator means by the tests of the other devices.
"""

import itertools
import re

import pytest
import torch

import torch_rpa
from jax_kernels import chips
from tests.support import compile_only_tpu
from tests.torch_rpa.calls import (
    assert_same_up_to_rounding,
    from_numpy,
    raw_bytes,
    to_numpy,
)

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
]
if REASON is None:
    from tests.torch_tpu import operator_cases as cases
    from tests.torch_tpu.sections import Sections
    from torch_rpa.bridges import torch_tpu_launch

CACHE = f"bf16[{10_000},4,8,2,128]"
EAGER, COMPILED = "decode_eager", "decode_compiled"
KV_CACHE = 3  # as a parameter


def run(chip: str, directory, *names: str, **variables: str) -> "Sections":
    module = "tests.torch_tpu.operator_cases"
    return Sections(chip, directory, module, names, cases.CASES, **variables)


@pytest.fixture(scope="module", params=chips.COMPILED)
def decode(request, tmp_path_factory) -> "Sections":
    """Decode steps, at once and compiled, on each chip."""
    directory = tmp_path_factory.mktemp(request.param)
    return run(request.param, directory, EAGER, COMPILED)


# The other cases run on one chip, in one process for the cases of a few tests that
# stand together: tests of two workers would each run all cases of a larger record.
GROUPS = {
    "buffers_record": ("views", "copies", "precompiled"),
    "options_record": ("features",),
    "calls_record": ("mistakes", "values", "opcheck", "reference"),
    "programs_record": ("tuned", "defaults", "ways"),
}


def record_of(group: str):
    @pytest.fixture(scope="module", name=group)
    def record(tmp_path_factory) -> "Sections":
        return run("v6e", tmp_path_factory.mktemp(group), *GROUPS[group])

    return record


buffers_record, options_record, calls_record, programs_record = map(record_of, GROUPS)


def test_every_case_is_run():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted([EAGER, COMPILED, *grouped]) == sorted(cases.CASES)


# ---- in place


def test_a_compiled_model_is_one_program_for_all_lengths(decode):
    (program,) = decode.kernel_programs(COMPILED)
    assert len(decode.dump.executions(program)) == 50
    assert len(program.hlo.kernel_calls) == cases.NUM_LAYERS


def test_a_compiled_model_keeps_each_cache_where_it_is(decode):
    (program,) = decode.kernel_programs(COMPILED)
    outputs = {n: t for n, t in enumerate(program.results) if t == CACHE}
    assert len(outputs) == cases.NUM_LAYERS
    aliases = program.aliases()
    assert set(aliases) == set(outputs)
    assert program.copies_of(CACHE) == []
    # Each takes over the cache of its own layer: the next step is given it there.
    executions = decode.dump.executions(program)
    for before, after in itertools.pairwise(executions):
        for output, parameter in aliases.items():
            assert after.arguments[parameter] == before.results[output]
        assert set(before.donated) == {before.arguments[p] for p in aliases.values()}


def test_calls_that_run_at_once_share_a_program_and_keep_the_cache(decode):
    (program,) = decode.kernel_programs(EAGER)
    executions = decode.dump.executions(program)
    assert len(executions) == 5 * cases.NUM_LAYERS
    assert program.aliases() == {1: KV_CACHE}
    assert program.copies_of(CACHE) == []
    for before, after in zip(executions, executions[cases.NUM_LAYERS :], strict=False):
        assert before.donated == (before.arguments[KV_CACHE],)
        assert after.arguments[KV_CACHE] == before.results[1]


def test_calls_go_the_short_way(decode):
    """If not, TorchTPU has changed: torch_tpu_launch.py wants another look."""
    short = torch_tpu_launch._direct.__qualname__
    for case in (EAGER, COMPILED):
        (launcher,) = decode.results[case]["launchers"]
        assert launcher.startswith(short)


def test_the_cache_is_kept_alive_on_request(tmp_path):
    kept = run("v6e", tmp_path, EAGER, TORCH_RPA_EAGER_DONATION="0")
    (program,) = kept.kernel_programs(EAGER)
    assert program.aliases() == {}
    assert not any(execution.donated for execution in kept.dump.executions())


def test_a_part_of_a_larger_tensor_is_warned_of(buffers_record):
    found = buffers_record.results["views"]
    assert len(found) == 7
    for kind, messages in found.items():
        if kind.startswith("whole"):
            assert messages == []
        else:
            (message,) = messages
            assert re.match(r"kv_cache is a view of \d+ bytes of a tensor", message)
            assert "copies the whole tensor in each call" in message


def test_copies_that_share_a_buffer_are_taken_it_away(buffers_record):
    """TorchTPU copies nothing for them at first: README's section on it says so."""
    for way, message in buffers_record.results["copies"].items():
        if way.startswith(("clone", "deepcopy", "copy_")):
            assert "was donated" in message, way
        else:
            assert message == "can be read", way


def test_what_would_keep_an_old_kernel_is_refused(buffers_record):
    message = buffers_record.results["precompiled"]
    assert "caching_precompile (TORCH_CACHING_PRECOMPILE) must be False" in message


# ---- all of the operator


def test_each_feature_is_one_program_with_one_alias(options_record):
    done, programs = (
        options_record.results["features"],
        options_record.kernel_programs("features"),
    )
    assert len(done) == len(programs) == 21
    for name, program in zip(done, programs, strict=True):
        assert len(program.hlo.kernel_calls) == 1
        is_read_only = "read only" in name
        results = 1 + ("lse" in name) + (not is_read_only)
        assert len(program.results) == results, name
        is_functional = "functional" in name
        assert bool(program.aliases()) == (not is_functional and not is_read_only)


def test_wrong_calls_are_the_errors_of_the_cpu(calls_record):
    for name, messages in calls_record.results["mistakes"].items():
        expected = {
            "another device": "kv_lens must be on the device of q, tpu:0, got cpu",
            "q on another device": "k must be on the device of q, cpu, got tpu:0",
        }.get(name)
        if expected is None:
            assert messages[0] == messages[1] != "no error", name
        else:
            assert messages == [f"ValueError: {expected}"]


def test_numbers_are_checked_on_request(calls_record):
    found = calls_record.results["values"]
    (warning,) = set(found.pop("compiled"))
    assert "TORCH_RPA_VALIDATE has no effect in a graph of torch.compile" in warning
    assert set(found.values()) == {
        "ValueError: page_indices[0] (page 0 of sequence 0) must be in [0, 32), got 77"
    }


def test_torch_finds_no_fault(calls_record):
    for results in calls_record.results["opcheck"].values():
        assert set(results.values()) == {"SUCCESS"}


def test_the_plain_computation_gives_the_numbers_of_the_cpu(calls_record):
    """Its program has no kernel, so that XLA can run it on the CPU as it is."""
    programs, calls = calls_record.programs("reference"), cases.reference_calls()
    for program, (call, options) in zip(programs, calls, strict=True):
        assert not program.hlo.kernel_calls
        out, *new_cache = execute_on_cpu(program.stablehlo, call)
        expected = torch_rpa.ragged_paged_attention(*call, **options)
        assert_same_up_to_rounding(out, expected)
        if new_cache:
            assert torch.equal(raw_bytes(new_cache[0]), raw_bytes(call.kv_cache))
        else:
            assert not options["update_kv_cache"]


def execute_on_cpu(stablehlo: str, call) -> list[torch.Tensor]:
    import jax
    from jaxlib import xla_client

    (device,) = jax.devices("cpu")[:1]
    devices = xla_client._xla.DeviceList((device,))  # pyright: ignore[reportAttributeAccessIssue]
    executable = device.client.compile_and_load(
        stablehlo.encode(), devices, xla_client.CompileOptions()
    )
    arguments = [jax.device_put(to_numpy(t), device) for t in call if t is not None]
    results = executable.execute_sharded(arguments)
    return [
        from_numpy(array)
        for (array,) in results.disassemble_into_single_device_arrays()
    ]


def test_tuned_records_in_force_are_another_program_once(programs_record):
    first, second = programs_record.kernel_programs("tuned")
    assert first.hlo.text != second.hlo.text
    assert [len(programs_record.dump.executions(p)) for p in (first, second)] == [2, 2]


def test_defaults_that_are_given_are_the_same_program(programs_record):
    (program,) = programs_record.kernel_programs("defaults")
    assert len(programs_record.dump.executions(program)) == 6


def test_the_short_way_passes_what_the_public_one_does(programs_record):
    short, public = programs_record.results["ways"]
    assert short == ["_direct.<locals>.launch"]
    assert public == ["through.<locals>.launch"]
    for program, tensors in zip(
        programs_record.kernel_programs("ways"), (8, 6), strict=True
    ):
        arguments = [e.arguments for e in programs_record.dump.executions(program)]
        assert len(arguments) == 3 and len(set(arguments)) == 1
        assert len(arguments[0]) == tensors
