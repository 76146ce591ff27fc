"""Training learns, can be interrupted anywhere, and writes a model that loads."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from torch_rpa.generate.byte_llama import train
from torch_rpa.generate.byte_llama.corpus import Document, Split
from torch_rpa.generate.byte_llama.evaluation import bits_per_byte

LINES = "".join(f"line {number} of a small corpus\n" for number in range(60))
SPLIT = Split([Document("a", LINES)], [Document("b", LINES[-200:])])
# With one row of 512 bytes, and so small a model, a step takes a fraction of a second.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
RECIPE = train.Recipe(steps=4, rows=1, warmup_steps=2)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """The model in training, with fewer and smaller matrices for Muon."""

    def small_config(**sizes: Any) -> LlamaConfig:
        sizes.update(SMALL)
        return LlamaConfig(**sizes)

    monkeypatch.setattr(train, "LlamaConfig", small_config)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from more threads, and the command sets them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(trainer: train.Trainer) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])


def advanced(recipe: train.Recipe, steps: int) -> train.Trainer:
    trainer = train.Trainer(recipe, SPLIT)
    for _ in range(steps):
        trainer.advance()
    return trainer


def test_learning_rates_rise_stay_and_fall():
    recipe = train.Recipe(steps=10, warmup_steps=2, decay_share=0.4)
    factors = [recipe.learning_rate_factor(step) for step in range(10)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole = advanced(RECIPE, 4)
    first = advanced(RECIPE, 2)
    first.save(tmp_path / "checkpoint.pt")
    second = train.Trainer(RECIPE, SPLIT)
    second.restore(tmp_path / "checkpoint.pt")
    assert second.step == 2 and second.cpu_seconds == first.cpu_seconds > 0
    second.advance()
    second.advance()
    assert torch.equal(weights(second), weights(whole))
    assert not torch.equal(weights(second), weights(first))


def test_a_run_may_be_prolonged_while_the_learning_rates_do_not_fall(tmp_path):
    path = tmp_path / "checkpoint.pt"
    longer = train.Recipe(steps=8, rows=1, warmup_steps=2)
    advanced(RECIPE, 2).save(path)
    prolonged = train.Trainer(longer, SPLIT)
    prolonged.restore(path)
    assert torch.equal(weights(prolonged), weights(advanced(longer, 2)))

    advanced(RECIPE, 3).save(path)  # the third step already falls
    with pytest.raises(ValueError, match=r"must be a checkpoint of Recipe\(steps=8"):
        train.Trainer(longer, SPLIT).restore(path)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train.Trainer(RECIPE, SPLIT).save(path)
    with pytest.raises(ValueError, match="seed=1"):
        train.Trainer(train.Recipe(4, 1, 2, seed=1), SPLIT).restore(path)


def test_training_learns():
    trainer = advanced(train.Recipe(steps=12, rows=1, warmup_steps=2), 12)
    untrained = train.Trainer(RECIPE, SPLIT)
    assert trainer.held_out_bits() < 0.7 * untrained.held_out_bits()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on the small corpus; a step is one row."""
    monkeypatch.setattr(train, "load_split", lambda: SPLIT)
    return lambda *more: train.main(["--out", str(tmp_path), "--rows", "1", *more])


def test_the_command_writes_a_model_and_what_it_took(run, tmp_path, capsys):
    assert run("--steps", "3", "--checkpoint-every", "2") == 0
    captured = capsys.readouterr()
    report = json.loads((tmp_path / "training.json").read_text())
    assert captured.out == json.dumps(report, indent=1) + "\n"
    assert "step 2: " in captured.err
    assert not (tmp_path / "checkpoint.pt").exists()
    assert report["trained_bytes"] == 3 * train.CONTEXT
    assert report["training_corpus_bytes"] == len(LINES)
    assert report["recipe"]["steps"] == 3

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    bits = bits_per_byte(model.float(), SPLIT.held_out, context=train.CONTEXT)
    assert report["held_out_bits_per_byte"] == pytest.approx(bits, abs=1e-4)


def test_the_command_goes_on_from_a_checkpoint(run, tmp_path, capsys):
    recipe = train.Recipe(steps=3, rows=1)
    advanced(recipe, 2).save(tmp_path / "checkpoint.pt")
    assert run("--steps", "3") == 0
    assert "2/3" in capsys.readouterr().err  # where the progress starts
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    whole = advanced(recipe, 3).model.bfloat16()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_command_refuses_another_runs_checkpoint(run, tmp_path, capsys):
    train.Trainer(train.Recipe(steps=3, rows=1, seed=9), SPLIT).save(
        tmp_path / "checkpoint.pt"
    )
    assert run("--steps", "3") == 2
    error = capsys.readouterr().err
    assert "must be a checkpoint of" in error and "remove it to start again" in error
    assert not (tmp_path / "model.safetensors").exists()
