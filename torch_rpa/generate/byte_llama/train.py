"""Trains the built-in model: ``python -m torch_rpa.generate.byte_llama.train --help``.

One thread of an ordinary CPU takes less than an hour. A run that was stopped goes on
from its checkpoint, and ends with the weights that it would have reached at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)

from torch_rpa.generate.byte_llama.batches import TrainingRows
from torch_rpa.generate.byte_llama.corpus import Split, load_split
from torch_rpa.generate.byte_llama.evaluation import bits_per_byte, cross_entropy
from torch_rpa.generate.tokenizer import ByteTokenizer

CONTEXT = 512
CHECKPOINT, REPORT = "checkpoint.pt", "training.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the corpus.

    Attributes:
        steps: Updates of the weights.
        rows: Rows of text in each, of ``CONTEXT`` bytes.
        warmup_steps: Steps over which the learning rates rise.
        decay_share: Last part of the steps, over which they fall to zero.
        matrix_learning_rate: Of the weights of the layers, by Muon.
        other_learning_rate: Of embeddings and norms, by AdamW.
        seed: Of the first weights and of the choice of rows.
    """

    steps: int = 2000
    rows: int = 8
    warmup_steps: int = 50
    decay_share: float = 0.4
    matrix_learning_rate: float = 0.03
    other_learning_rate: float = 1e-2
    seed: int = 0

    @property
    def decay_start(self) -> int:
        """The first step with falling learning rates."""
        return self.steps - math.ceil(self.steps * self.decay_share)

    def learning_rate_factor(self, step: int) -> float:
        """Returns what the learning rates of a step are multiplied by, up to 1."""
        rising = (step + 1) / self.warmup_steps
        falling = (self.steps - step) / (self.steps - self.decay_start)
        return min(1.0, rising, falling)


class Trainer:
    """A model in training: its optimisers, how far it is, and what that took.

    Args:
        recipe: How to train.
        split: The corpus.
    """

    def __init__(self, recipe: Recipe, split: Split):
        self.recipe = recipe
        self.split = split
        self.rows = TrainingRows(split.training, CONTEXT)
        self.model = new_model(recipe.seed).train()
        self.optimizers = _optimizers(self.model, recipe)
        self.base_rates = [
            [group["lr"] for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]
        self.step = 0
        self.cpu_seconds = 0.0

    def advance(self) -> float:
        """Makes one step and returns its loss in bits per token."""
        start = time.process_time()
        factor = self.recipe.learning_rate_factor(self.step)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        seed = (self.recipe.seed << 32) + self.step
        rows = self.rows.sample(self.recipe.rows, seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(self.model, rows[:, :-1], rows[:, 1:], "mean")
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.cpu_seconds += time.process_time() - start
        return loss.item() / math.log(2)

    def held_out_bits(self) -> float:
        """Returns bits per byte of the held-out documents."""
        self.model.eval()
        bits = bits_per_byte(self.model, self.split.held_out, context=CONTEXT)
        self.model.train()
        return bits

    def save(self, path: Path) -> None:
        """Writes a checkpoint; a reader never sees half of one."""
        partial = path.with_suffix(".partial")
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
        }
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint of the same recipe.

        The number of steps may be another one as long as the learning rates do not fall
        yet by either: so far they were then the same.
        """
        state = torch.load(path, weights_only=True)
        made = Recipe(**state["recipe"])
        decay_start = min(made.decay_start, self.recipe.decay_start)
        if made != self.recipe and (
            dataclasses.replace(made, steps=self.recipe.steps) != self.recipe
            or state["step"] > decay_start
        ):
            raise ValueError(
                f"{path} must be a checkpoint of {self.recipe}, got one of {made}"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step = state["step"]
        self.cpu_seconds = state["cpu_seconds"]


def new_model(seed: int) -> PreTrainedModel:
    """Returns the untrained model, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
        pad_token_id=ByteTokenizer.eos_token_id,
    )
    return model


def _optimizers(
    model: PreTrainedModel, recipe: Recipe
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and ".layers." in name
        (matrices if is_matrix else others).append(parameter)
    return (
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.05),
        torch.optim.AdamW(
            others, lr=recipe.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        ),
    )


def export(trainer: Trainer, directory: Path) -> dict:
    """Writes what ``from_pretrained`` reads, in bfloat16, and a report of it.

    Returns:
        The report. Its bits per byte are of the weights as written, in float32.
    """
    trainer.model.eval().bfloat16().save_pretrained(directory)
    written = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    split = trainer.split
    report = {
        "held_out_bits_per_byte": round(
            bits_per_byte(written.eval(), split.held_out, context=CONTEXT), 4
        ),
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "recipe": dataclasses.asdict(trainer.recipe),
        "context": CONTEXT,
        "trained_bytes": trainer.step * trainer.recipe.rows * CONTEXT,
        "training_corpus_bytes": _num_bytes(split.training),
        "held_out_corpus_bytes": _num_bytes(split.held_out),
        "cpu_seconds": round(trainer.cpu_seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    text = json.dumps(report, indent=1) + "\n"
    (directory / REPORT).write_text(text, encoding="utf-8")
    return report


def _num_bytes(documents: Sequence[tuple[str, str]]) -> int:
    return sum(len(text.encode("utf-8")) for _, text in documents)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / CHECKPOINT
    recipe = Recipe(steps=args.steps, rows=args.rows, seed=args.seed)
    trainer = Trainer(recipe, load_split())
    if checkpoint.exists():
        try:
            trainer.restore(checkpoint)
        except ValueError as error:
            print(f"error: {error}; remove it to start again", file=sys.stderr)
            return 2
    with tqdm(total=args.steps, initial=trainer.step, unit="step") as progress:
        while trainer.step < args.steps:
            bits = trainer.advance()
            progress.set_postfix_str(f"{bits:.3f} bits", refresh=False)
            progress.update()
            if trainer.step % args.checkpoint_every == 0:
                trainer.save(checkpoint)
                held_out = trainer.held_out_bits()
                progress.write(
                    f"step {trainer.step}: {held_out:.3f} bits per byte held out, "
                    f"{trainer.cpu_seconds:.0f} CPU seconds",
                    file=sys.stderr,
                )
    print(json.dumps(export(trainer, args.out), indent=1))
    checkpoint.unlink(missing_ok=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_rpa.generate.byte_llama.train",
        description="Train the built-in model on the text inside this Python.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the model goes, and the checkpoint until it is complete",
    )
    parser.add_argument("--steps", type=_positive, default=Recipe.steps)
    parser.add_argument(
        "--rows", type=_positive, default=Recipe.rows, help="of text in each step"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        help="another number gives slightly other weights",
    )
    parser.add_argument("--checkpoint-every", type=_positive, default=250, help="steps")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
