"""Serves tiny models with vLLM, and prints what came out, as JSON.

``python -m tests.vllm.engine_cases CASE`` runs one case in a process of its own: vLLM
keeps its configuration and its device for the life of a process.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# vLLM has an environment of its own.

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from jax_kernels import chips

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PJRT_DEVICE"] = "CPU"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler can be seen
os.environ["VLLM_XLA_CACHE_PATH"] = ""
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# The runtime asks for the machine's TPU for minutes otherwise.
os.environ.update(chips.COMPILE_ONLY_ENVIRONMENT)

import torch
import transformers

from tests.support.child_results import print_result
from tests.support.engine_trials import (
    FAMILIES,
    NUM_NEW_TOKENS,
    PAGE_SIZE,
    SMALL,
    expected_tokens,
    generate,
    make_model,
    make_prompts,
    runner_of,
    tokens_beside_cancelled,
    tokens_with_few_pages,
)


def make_engine(directory: str, **options: Any) -> Any:
    import vllm

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,  # long prompts come in chunks
        "block_size": PAGE_SIZE,
        "num_gpu_blocks_override": 128,
        "enable_prefix_caching": True,
    }
    return vllm.LLM(directory, **defaults | options)


def serve_family(family: str) -> dict[str, Any]:
    """Chunks, then prefixes, then too few pages, then requests that are cancelled."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(family, directory)
        prompts = make_prompts()
        expected = expected_tokens(model, prompts)
        engine = make_engine(directory)
        first, _ = generate(engine, prompts)
        again, num_cached = generate(engine, prompts)
        cancelled = tokens_beside_cancelled(engine, prompts)
        runner = runner_of(engine)
        return {
            "expected": expected,
            "first": first,
            "again": again,
            "cached": num_cached,
            "cancelled": cancelled,
            "cache": list(runner.kv_caches[0].shape),
            "backend": type(runner).__name__,
        }


def preempt() -> dict[str, Any]:
    """Serves with so few pages that requests are taken out and computed again."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_model("llama", directory)
        prompts = make_prompts()
        engine = make_engine(
            directory,
            num_gpu_blocks_override=13,
            max_model_len=128,
            enable_prefix_caching=False,
        )
        tokens, preempted = tokens_with_few_pages(engine, prompts)
        return {
            "expected": expected_tokens(model, prompts),
            "first": tokens,
            "preempted": preempted,
        }


def float8() -> dict[str, Any]:
    """A float8 cache with the scales of a checkpoint, beside this project's engine."""
    from torch_rpa.serving import Engine, EngineOptions, SamplingParams

    scales: dict[str, Any] = {"k_scale": 0.03, "v_scale": 0.01}
    with tempfile.TemporaryDirectory() as directory:
        model = make_model("llama", directory)
        add_scales(directory, **scales)
        prompts = make_prompts()
        engine = make_engine(directory, kv_cache_dtype="fp8")
        tokens, _ = generate(engine, prompts)
        options = EngineOptions(
            max_num_sequences=8,
            max_tokens_per_step=64,
            cache_dtype=torch.float8_e4m3fn,
            **scales,
        )
        params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, eos_token_ids=[])
        unquantised = expected_tokens(model, prompts)
        model.set_attn_implementation("rpa")
        own = Engine(model, options).generate_batch(prompts, params)
        return {
            "expected": [output.generated_tokens for output in own.values()],
            "unquantised": unquantised,
            "first": tokens,
            "dtype": str(runner_of(engine).kv_caches[0].dtype),
        }


def add_scales(directory: str, **scales: float) -> None:
    """Adds scales of keys and values to a checkpoint, as compressed-tensors does."""
    from safetensors.torch import load_file, save_file

    path = os.path.join(directory, "model.safetensors")
    tensors = load_file(path)
    for layer in range(SMALL["num_hidden_layers"]):
        for name, value in scales.items():
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(value)
    save_file(tensors, path, metadata={"format": "pt"})
    path = os.path.join(directory, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "dynamic": False,
            "symmetric": True,
        },
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)


def spmd() -> dict[str, Any]:
    """Heads over two devices, in one process."""
    os.environ.update(CPU_NUM_DEVICES="2", VLLM_XLA_USE_SPMD="1")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model("llama", directory)
        prompts = make_prompts()
        engine = make_engine(directory, tensor_parallel_size=2)
        first, _ = generate(engine, prompts)
        again, num_cached = generate(engine, prompts)
        import torch_xla

        cache = runner_of(engine).kv_caches[0]
        return {
            "expected": expected_tokens(model, prompts),
            "first": first,
            "again": again,
            "cached": num_cached,
            "sharding": torch_xla._XLAC._get_xla_sharding_spec(cache),
        }


def make_tokenizer(directory: str) -> None:
    """Saves a tokenizer that writes token 17 as ``w17``."""
    import tokenizers

    words = {f"w{index}": index for index in range(SMALL["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(directory)


def serve() -> dict[str, Any]:
    """The server of vLLM: one request, and one that is streamed."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_model("llama", directory)
        make_tokenizer(directory)
        prompts = make_prompts()[1:2]
        with running_server(directory) as url:
            body = {
                "model": "tiny",
                "prompt": prompts[0],
                "max_tokens": NUM_NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            (line,) = post(url, body)
            streamed = post(url, body | {"stream": True})
            refused = post(url, body | {"presence_penalty": 1.0})
        events = [
            json.loads(line.removeprefix("data: "))
            for line in streamed
            if line.startswith("data: ") and line != "data: [DONE]"
        ]
        return {
            "expected": expected_tokens(model, prompts),
            "first": [numbers_of(json.loads(line)["choices"][0]["text"])],
            "streamed": [numbers_of("".join(e["choices"][0]["text"] for e in events))],
            "events": len(events),
            "refused": "".join(refused),
        }


def numbers_of(text: str) -> list[int]:
    return [int(word.removeprefix("w")) for word in text.split()]


@contextlib.contextmanager
def running_server(directory: str) -> Iterator[str]:
    """Starts ``vllm serve`` and gives its address; stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        os.path.join(os.path.dirname(sys.executable), "vllm"),
        *("serve", directory, "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "256", "--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "64", "--block-size", "16"),
        *("--num-gpu-blocks-override", "64"),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def post(url: str, body: dict[str, Any]) -> list[str]:
    """Returns the lines of the answer, also if it is an error."""
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.read().decode().splitlines()
    except urllib.error.HTTPError as error:
        return error.read().decode().splitlines()


CASES = {family: lambda family=family: serve_family(family) for family in FAMILIES}
CASES |= {"preempt": preempt, "float8": float8, "spmd": spmd, "server": serve}

if __name__ == "__main__":
    print_result(CASES[sys.argv[1]]())
