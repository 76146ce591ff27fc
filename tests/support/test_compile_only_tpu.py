"""The compile-only TPU: what is recorded of programs, executions and donations."""

import functools
import json
import pathlib
import re

import pytest

from jax_kernels import chips
from tests.support import compile_only_tpu

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
    pytest.mark.torch_tpu,
]

MATRIX = "f32[256,256]"
USE_TPU = "import torch; torch.ones(2, device='tpu').cpu()"
OLD_LIBTPU = """
#include "pjrt.h"

extern "C" const pjrt::Api* GetPjrtApi() {
  static pjrt::Api api{};
  api.struct_size = sizeof api;
  api.version.minor = 50;
  return &api;
}
"""


def run_cases(chip, dump_dir, *cases, **options):
    program = "tests.support.compile_only_program"
    completed = compile_only_tpu.run(chip, dump_dir, "-m", program, *cases, **options)
    results = json.loads(completed.stdout.splitlines()[-1])
    return results, compile_only_tpu.Dump(dump_dir)


@pytest.fixture(scope="module")
def record_of(tmp_path_factory):
    """Gives what the cases printed on a chip, and the record."""

    @functools.cache
    def record_of(chip):
        directory = tmp_path_factory.mktemp(chip)
        return run_cases(chip, directory, "eager", "compiled", "donated", "large")

    return record_of


@pytest.fixture(params=chips.COMPILED)
def recorded(request, record_of):
    """The chip, what the cases printed, and the record."""
    return request.param, *record_of(request.param)


def test_an_eager_operation_compiles_once(recorded):
    chip, results, dump = recorded
    (multiply,) = dump.programs("tt_jit_mm")
    assert multiply.topology == f"{chip}:1x1x1"
    assert multiply.results == (MATRIX,)
    assert not multiply.loaded
    assert len(dump.executions(multiply)) == 2
    assert results["eager"]["sums"] == [0, 0]  # not 256³


def test_what_comes_from_the_host_goes_back_to_it(recorded):
    _, results, dump = recorded
    assert results["eager"]["copied"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    copies = {
        kind: {event["buffer"] for event in dump.events if is_copy(event, kind, 48)}
        for kind in ("copy_to_device", "copy_to_host")
    }
    assert len(copies["copy_to_device"]) == 1
    assert copies["copy_to_device"] == copies["copy_to_host"]


def is_copy(event, kind, num_bytes):
    return event["event"] == kind and event["bytes"] == num_bytes


def test_a_compiled_function_is_one_program(recorded):
    _, results, dump = recorded
    (program,) = (p for p in dump.programs() if "multiply_and_add" in p.name)
    executions = dump.executions(program)
    assert len(executions) == 3
    first_arguments = {execution.arguments[0] for execution in executions}
    assert len({execution.arguments for execution in executions}) == 3
    assert len(first_arguments | {e.arguments[1] for e in executions}) == 4
    assert results["compiled"] == [0, 0, 0]


def test_source_options_and_optimised_program_can_be_read(recorded):
    _, _, dump = recorded
    (program,) = (p for p in dump.programs() if "multiply_and_add" in p.name)
    assert "stablehlo.dot_general" in program.stablehlo
    assert "tensor<256x256xf32>" in program.stablehlo
    assert program.options.num_partitions == 1
    assert program.hlo.text.startswith("HloModule")
    assert "convolution" in program.copies_of(MATRIX)
    assert program.aliases() == {}
    for name in ("options", "stablehlo"):
        assert all(getattr(p, name) for p in dump.programs())


def test_a_donated_argument_is_recorded(recorded):
    _, _, dump = recorded
    (program,) = (p for p in dump.programs() if p.aliases())
    assert program.aliases() == {0: 0}
    first, second = dump.executions(program)
    assert first.donated == first.arguments[:1]
    # The second one is given what the first one returned.
    assert second.donated == second.arguments[:1] == first.results
    assert second.bytes_in_use == first.bytes_in_use


def test_a_donated_tensor_cannot_be_used_again(recorded):
    _, results, _ = recorded
    errors = results["donated"]
    assert re.search(r"buffer \d+, f32\[256,256\], was donated to", errors["read"])
    assert "copied from" in errors["read"]
    assert "passed as argument 0 of program" in errors["passed"]
    assert errors["after copy_"] is None


def test_large_tensors_take_no_host_memory(recorded):
    _, results, dump = recorded
    assert results["large"]["elements"] == 2**30
    assert any("f32[1073741824]" in p.results for p in dump.programs())
    assert results["large"]["bytes"] < 2**30


def test_programs_are_loaded_from_a_cache_on_disk(record_of, tmp_path):
    """Also by a process with another chip: that torch's cache does not know."""
    _, first = record_of("v6e")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(first.directory / "torch_cache")}
    for chip in ("v6e", "tpu7x"):
        _, dump = run_cases(chip, tmp_path / chip, "compiled", variables=cache)
        (program,) = (p for p in dump.programs() if "multiply_and_add" in p.name)
        assert program.loaded
        assert program.topology == "v6e:1x1x1"
        assert len(dump.executions(program)) == 3


def test_each_process_needs_a_new_directory(tmp_path):
    (tmp_path / "events.jsonl").touch()
    child = compile_only_tpu.run("v6e", tmp_path, "-c", USE_TPU, check=False)
    assert child.returncode != 0
    assert "events.jsonl exists: each process needs a new one" in child.stderr


def test_a_libtpu_of_an_old_interface_is_refused(tmp_path):
    source = tmp_path / "old.cc"
    source.write_text(OLD_LIBTPU)
    library = tmp_path / "old.so"
    declarations = pathlib.Path(compile_only_tpu.__file__).parent
    compile_only_tpu.compile_library([source], library, f"-I{declarations}")
    old = {"COMPILE_ONLY_TPU_LIBTPU": str(library)}
    child = compile_only_tpu.run(
        "v6e", tmp_path, "-c", USE_TPU, variables=old, check=False
    )
    assert child.returncode != 0
    assert "expected version 0.81 or a later minor one" in child.stderr
    assert "got 0.50" in child.stderr
