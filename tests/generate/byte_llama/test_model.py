"""The model that is shipped: it loads, predicts text well, and writes it."""

import json
import math
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_rpa.transformers as rpa_transformers
from torch_rpa.generate import byte_llama
from torch_rpa.generate.byte_llama.evaluation import bits_per_byte
from torch_rpa.generate.byte_llama.train import CONTEXT, REPORT, new_model
from torch_rpa.generate.models import eos_token_ids, load_model
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import Engine, EngineOptions, SamplingParams

ROOT = Path(__file__).parents[3]
PROMPTS = (
    "The statement",
    "def read(self, size=-1):",
    "Return the number of",
    "If the argument is",
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(None, "eager", torch.float32)


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((byte_llama.WEIGHTS / REPORT).read_text())


@pytest.fixture(scope="module")
def texts(model) -> list[str]:
    """What the model writes greedily, by its own ``generate``."""
    tokenizer, texts = ByteTokenizer(), []
    for prompt in PROMPTS:
        input_ids = torch.tensor([tokenizer.encode(prompt)])
        mask = torch.ones_like(input_ids)
        tokens = model.generate(input_ids, attention_mask=mask, max_new_tokens=200)
        texts.append(tokenizer.decode(tokens[0, input_ids.shape[1] :].tolist()))
    return texts


def trigram_bits_per_byte(training: bytes, held_out: bytes) -> float:
    """Bits per byte of a byte trigram, smoothed with those of lower order."""

    def counts(order: int) -> torch.Tensor:
        data = torch.frombuffer(bytearray(training), dtype=torch.uint8).long()
        codes = torch.zeros(len(data) - order + 1, dtype=torch.int64)
        for offset in range(order):
            codes = codes * 256 + data[offset : offset + len(codes)]
        return torch.bincount(codes, minlength=256**order).view(-1, 256).double()

    probability = torch.full((1, 256), 1 / 256, dtype=torch.float64)
    for order in (1, 2, 3):
        table = counts(order)
        lower = probability.repeat(len(table) // len(probability), 1)
        weight = (table > 0).sum(-1, keepdim=True).clamp(min=1)  # Witten-Bell
        probability = (table + weight * lower) / (table.sum(-1, keepdim=True) + weight)
    data = torch.frombuffer(bytearray(held_out), dtype=torch.uint8).long()
    rows = data[:-2] * 256 + data[1:-1]
    return -probability[rows, data[2:]].log2().mean().item()


def test_it_is_the_architecture_that_the_script_trains(model):
    fresh = new_model(seed=0)
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(model.config, name) == getattr(fresh.config, name)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in fresh.state_dict().items()}
    assert model.config.tie_word_embeddings
    assert eos_token_ids(model) == (ByteTokenizer.eos_token_id,)


def test_it_is_small_and_stored_in_bfloat16(report):
    path = byte_llama.WEIGHTS / "model.safetensors"
    assert path.stat().st_size < 4_000_000
    stored = AutoModelForCausalLM.from_pretrained(byte_llama.WEIGHTS, dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert stored.num_parameters() == report["parameters"]


@pytest.mark.slow
def test_it_predicts_unseen_text_far_better_than_a_trigram(model, split, report):
    bits = bits_per_byte(model, split.held_out, context=CONTEXT)
    if platform.python_version() == report["python"]:
        # The sums of matrix products differ a little from one CPU to the next.
        assert bits == pytest.approx(report["held_out_bits_per_byte"], abs=0.01)
    joined = ("".join(text for _, text in part).encode() for part in split)
    baseline = trigram_bits_per_byte(*joined)
    assert math.isfinite(baseline) and bits < 0.75 * baseline


@pytest.mark.slow
def test_its_text_is_printable_and_made_of_words(texts, split):
    words = re.compile(r"[A-Za-z]{3,}")
    known = {w for _, text in split.training for w in words.findall(text)}
    written = [word for text in texts for word in words.findall(text)]
    assert all(c.isprintable() or c == "\n" for text in texts for c in text)
    assert len(written) > 40
    assert sum(word in known for word in written) >= 0.9 * len(written)


@pytest.mark.slow
def test_its_texts_differ_with_the_prompt(texts):
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_ragged_paged_attention_writes_the_same_texts(texts):
    tokenizer = ByteTokenizer()
    model = load_model(None, rpa_transformers.ATTENTION_NAME, torch.float32)
    engine = Engine(model, EngineOptions(max_num_sequences=4, device="cpu"))
    outputs = engine.generate_batch(
        [tokenizer.encode(prompt) for prompt in PROMPTS],
        SamplingParams(max_new_tokens=200, eos_token_ids=eos_token_ids(model)),
    )
    generated = [output.generated_tokens for output in outputs.values()]
    assert [tokenizer.decode(tokens) for tokens in generated] == texts


def test_a_built_package_holds_it(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib"]
    subprocess.run([*command, str(tmp_path)], cwd=ROOT, check=True)
    shipped = tmp_path / byte_llama.WEIGHTS.relative_to(ROOT)
    files = {path.name for path in byte_llama.WEIGHTS.iterdir()}
    assert {path.name for path in shipped.iterdir()} == files
    assert "model.safetensors" in files and "README.md" in files
