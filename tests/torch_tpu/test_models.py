"""Models on ``tpu`` tensors: programs, caches and copies of generation and serving.

Values are zeros on the compile-only TPU, so tokens say nothing here. That they are
right is shown where there are values: on CPU tensors and on torch_xla's CPU device,
with the same code.
"""

import itertools
import re
import statistics

import pytest

from jax_kernels import chips
from tests.support import compile_only_tpu

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
]
if REASON is None:
    from tests.torch_tpu import model_cases as cases
    from tests.torch_tpu.sections import Sections

MODULE = "tests.torch_tpu.model_cases"
CACHE = f"bf16[{10_000},4,8,2,128]"
# The HLO of its experts has operations that the parser of jaxlib 0.10.2 refuses.
UNREADABLE = "sinks and windows"
COPIES_OF_A_STEP = 8  # ids, pending rows, positions, last tokens; four of the batch


@pytest.fixture(scope="module")
def v6e(tmp_path_factory) -> "Sections":
    names = [name for name in cases.CASES if name not in cases.FAMILIES]
    directory = tmp_path_factory.mktemp("v6e")
    return Sections("v6e", directory, MODULE, names, cases.CASES)


@pytest.fixture(scope="module", params=[c for c in chips.COMPILED if c != "v5e"])
def features(request, tmp_path_factory) -> "Sections":
    directory = tmp_path_factory.mktemp(request.param)
    return Sections(request.param, directory, MODULE, list(cases.FAMILIES), cases.CASES)


def assert_caches_stay(program, executions, cache: str, num_layers: int = 2) -> None:
    """Every step takes over the buffers of the step before, without a copy."""
    outputs = {index for index, kind in enumerate(program.results) if kind == cache}
    aliases = program.aliases()
    assert set(aliases) == outputs and len(outputs) == num_layers
    assert program.copies_of(cache) == []
    for before, after in itertools.pairwise(executions):
        for output, parameter in aliases.items():
            assert after.arguments[parameter] == before.results[output]


def usual_copies(record: "Sections", case: str) -> float:
    """Copies to the device between two reads; the first step may bring weights too."""
    counts = [0]
    for event in record.events(case):
        if event["event"] == "copy_to_host":
            counts.append(0)
        counts[-1] += event["event"] == "copy_to_device"
    return statistics.median(counts)


# ---- the model, called directly


def test_a_compiled_model_is_one_program_for_all_lengths(v6e):
    (program,) = v6e.kernel_programs("model_compiled")
    executions = v6e.dump.executions(program)
    assert len(executions) == cases.DECODES
    assert len(program.hlo.kernel_calls) == cases.NUM_LAYERS
    assert_caches_stay(program, executions, CACHE)
    assert v6e.results["model_compiled"]["shape"] == [1, 4, 258]


def test_weights_are_arguments_of_the_program(v6e):
    (program,) = v6e.kernel_programs("model_compiled")
    executions = v6e.dump.executions(program)
    kept = set.intersection(*(set(e.arguments) for e in executions))
    num_tensors = v6e.results["model_compiled"]["tensors"]
    # Some buffers of rotary embeddings are there twice, one for reference.
    assert num_tensors - 1 <= len(kept) <= num_tensors
    arrays = re.compile(r"= (?:f32|bf16)\[\d[\d,]*\]\S* constant\(")
    assert not arrays.search(program.hlo.text)


def test_a_model_runs_without_torch_compile(v6e):
    (program,) = v6e.kernel_programs("model_eager")
    assert len(v6e.dump.executions(program)) == 3 * cases.NUM_LAYERS
    assert program.copies_of(CACHE) == []
    assert list(program.aliases().values()) == [3]


def test_scales_are_measured_on_the_device(v6e):
    assert v6e.results["measured_scales"] == [1.0, 1.0]  # keys are zeros here


# ---- generate


@pytest.mark.parametrize(
    ("case", "programs", "num_prefills"),
    [
        ("generate_twice", [4, 0], 1),  # opening, the caches, prefill and decode
        ("generate_in_chunks", [1, 0], 3),  # a chunk; the rest is known
        ("generate_in_a_block", [0, 0], 1),  # all are known
    ],
)
def test_programs_steps_and_copies_of_generation(v6e, case, programs, num_prefills):
    result = v6e.results[case]
    assert result["programs"] == programs
    assert result["shape"] == [4, 42] and result["device"] == "cpu"
    assert result["made"] == 4 and result["left"] == 0  # without a search for cycles
    num_steps = 2 * (num_prefills + 20)
    num_fills = 4
    num_openings = 1 if case == "generate_twice" else 0  # of the device, the first
    assert v6e.count(case, "execute") == num_steps + num_fills + num_openings
    assert v6e.count(case, "copy_to_host") == num_steps
    # Transformers copies ids, mask and positions of a step for its own forward.
    further = 3 if case == "generate_in_a_block" else 0
    assert usual_copies(v6e, case) == COPIES_OF_A_STEP + further


# ---- serving


def test_an_engine_compiles_two_programs_for_each_size(v6e):
    assert v6e.results["warm_up"] == [5, 5]
    kernels = v6e.kernel_programs("warm_up")
    assert len(kernels) == 4
    assert all(len(program.aliases()) == 2 for program in kernels)


def test_the_engine_does_on_a_tpu_what_it_does_on_the_cpu(v6e):
    on_tpu, on_cpu = (v6e.results["serving"][device] for device in ("tpu", "cpu"))
    assert on_tpu == on_cpu  # no program either
    assert on_tpu["preemptions"] > 0 and max(on_tpu["shared"]) > 0
    assert [len(tokens) for tokens in on_tpu["tokens"]] == [40, 30, 20, 12]


def test_a_step_of_the_engine_is_one_program_and_one_read(v6e):
    num_steps = len(v6e.results["serving"]["tpu"]["steps"])
    assert v6e.count("serving", "execute") == num_steps
    assert v6e.count("serving", "copy_to_host") == num_steps
    assert usual_copies(v6e, "serving") == COPIES_OF_A_STEP


def test_a_step_that_samples_is_one_program_too(v6e):
    result = v6e.results["serving_sampled"]
    assert result["programs"] == 0
    assert v6e.count("serving_sampled", "execute") == result["steps"]
    # The wishes of the requests are five tensors; a step that samples nothing needs
    # none.
    assert usual_copies(v6e, "serving_sampled") == COPIES_OF_A_STEP + 5


def test_a_second_engine_finds_the_programs_of_the_first(v6e):
    assert v6e.results["another_engine"] == 0


# ---- features of models


def test_models_of_each_feature_keep_their_caches_in_place(features):
    for name in cases.FAMILIES:
        cache = features.results[name]
        programs = [p for p in features.programs(name) if p.results.count(cache) > 1]
        assert len(programs) == 1, name  # prefill and decode are of one size
        (program,) = programs
        executions = features.dump.executions(program)
        assert len(executions) > 2
        for before, after in itertools.pairwise(executions):
            assert len(before.donated) == cases.NUM_LAYERS
            places = [before.arguments.index(buffer) for buffer in before.donated]
            new = [
                before.results[n] for n, t in enumerate(program.results) if t == cache
            ]
            assert sorted(after.arguments[place] for place in places) == sorted(new)
        if name != UNREADABLE:
            assert len(program.hlo.kernel_calls) == cases.NUM_LAYERS
            assert_caches_stay(program, executions, cache)


# ---- the command


def test_the_command_checks_in_float32(v6e):
    assert v6e.results["command"] == 1  # it found a difference: results are zeros
    for program in v6e.kernel_programs("command"):
        products = [
            line
            for line in program.hlo.text.splitlines()
            if " convolution(" in line or " dot(" in line
        ]
        assert products
        assert all("operand_precision={highest,highest}" in line for line in products)
