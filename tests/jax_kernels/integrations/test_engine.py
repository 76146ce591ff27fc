"""vLLM on JAX serves with the backend, in processes of their own: engine_cases.py."""

import functools
import os
import subprocess
import sys

import pytest

from tests.support import child_results

PREFIX_HITS = [0, 16, 32, 48, 0, 96]  # whole pages of the prompts


@functools.cache
def result_of(case):
    devices = CASES[case][1] if case in CASES else 1
    return child_results.result_of(
        "tests.jax_kernels.integrations.engine_cases",
        case,
        JAX_NUM_CPU_DEVICES=str(devices),
    )


CASES = {  # the shape of a cache of 128 pages of 16 tokens in float32, and the devices
    "llama": ([128, 16, 4, 1, 128], 1),
    "qwen3": ([128, 16, 2, 1, 128], 1),  # a key beside its value
    "gemma3_text": ([128, 16, 4, 1, 128], 1),
    "gpt_oss": ([128, 16, 2, 1, 128], 1),
    "flax": ([128, 16, 4, 1, 128], 1),
    "two_devices": ([128, 16, 4, 1, 128], 2),
}


@pytest.mark.tpu_inference
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_chunked_prompts_get_the_tokens_of_transformers(case):
    result = result_of(case)
    assert result["backend"] == "TorchRpaAttention"
    assert (result["cache"], result["devices"]) == CASES[case]
    assert result["first"] == result["expected"]


@pytest.mark.tpu_inference
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_prompts_whose_beginning_is_in_the_cache_get_them_too(case):
    result = result_of(case)
    assert result["cached"] == PREFIX_HITS
    assert result["again"] == result["expected"]


@pytest.mark.tpu_inference
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_cancelled_requests_leave_others_alone(case):
    result = result_of(case)
    assert result["cancelled"] == result["expected"][::2]


@pytest.mark.tpu_inference
@pytest.mark.slow
def test_requests_that_are_taken_out_for_lack_of_pages_are_computed_again():
    result = result_of("preempt")
    assert result["preempted"] > 0
    assert result["first"] == result["expected"]


def test_registering_imports_no_jax():
    code = (
        "import sys, jax_kernels.integrations.tpu_inference as t; t.register();"
        "sys.exit('jax' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(child_results.ROOT)}
    hidden = "import sys; sys.modules['tpu_inference'] = None\n"
    command = [sys.executable, "-c", hidden + code]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
