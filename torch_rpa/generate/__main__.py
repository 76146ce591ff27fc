"""Command line: ``python -m torch_rpa.generate --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from torch_rpa.generate import check, models
from torch_rpa.generate.engine import EngineOptions, GenerationResult, generate
from torch_rpa.generate.page_allocator import OutOfPagesError
from torch_rpa.kv_cache import CACHE_DTYPES
from torch_rpa.transformers import ATTENTION_NAME

DEFAULT_PROMPTS = (
    "Once upon a time",
    "def attention(q, k, v):",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "1, 1, 2, 3, 5, 8,",
)
MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_DTYPES_BY_NAME = {str(d).removeprefix("torch."): d for d in CACHE_DTYPES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.check and (args.dtype, args.cache_dtype or args.dtype) != ("float32",) * 2:
        parser.error("--check compares in float32: drop --dtype and --cache-dtype")
    try:
        return _run(args)
    except (ValueError, NotImplementedError, OutOfPagesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_rpa.generate",
        description="Generate for several prompts at once with ragged paged attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = EngineOptions()
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a Llama-family model saved by transformers, with its tokenizer; "
        "without it a small built-in one with random weights",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"may be repeated; without it {len(DEFAULT_PROMPTS)} built-in prompts",
    )
    parser.add_argument("--device", choices=("xla", "cpu"), default=defaults.device)
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=defaults.max_new_tokens
    )
    parser.add_argument(
        "--page-size", type=_positive, default=defaults.page_size, help="tokens"
    )
    parser.add_argument(
        "--num-pages", type=_positive, help="without it enough for all prompts"
    )
    parser.add_argument(
        "--max-tokens-per-step",
        type=_positive,
        help="cut prefills into several steps; without it all prompts in one step",
    )
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default="float32")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES_BY_NAME, help="without it --dtype"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every token with the model's own generate (eager attention, "
        "float32, CPU) and fail on the first difference",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _run(args: argparse.Namespace) -> int:
    options = EngineOptions(
        device=args.device,
        max_new_tokens=args.max_new_tokens,
        page_size=args.page_size,
        num_pages=args.num_pages,
        max_tokens_per_step=args.max_tokens_per_step,
        cache_dtype=CACHE_DTYPES_BY_NAME.get(args.cache_dtype),
    )
    if args.check and args.device == "xla":
        _multiply_in_float32()
    tokenizer = models.load_tokenizer(args.model)
    texts = args.prompt or DEFAULT_PROMPTS
    prompts = [tokenizer.encode(text) for text in texts]
    model = models.load_model(args.model, ATTENTION_NAME, MODEL_DTYPES[args.dtype])
    eos_token_ids = models.eos_token_ids(model)

    total = len(prompts) * args.max_new_tokens
    with tqdm(total=total, unit="token", desc="generating") as progress:
        result = generate(
            model,
            prompts,
            options,
            eos_token_ids=eos_token_ids,
            on_step=lambda step: progress.update(step.num_generated),
        )
    for text, generated in zip(texts, result.generated, strict=True):
        print(f"--- {text}")
        print(_printable(tokenizer.decode(generated, skip_special_tokens=True)))
    _print_summary(result, args.device)
    if not args.check:
        return 0
    del model
    return _check(args, prompts, result, eos_token_ids)


def _multiply_in_float32() -> None:
    """Tells a TPU, which would otherwise multiply float32 in bfloat16."""
    import torch_xla.backends
    import torch_xla.runtime

    if torch_xla.runtime.device_type() == "TPU":
        torch_xla.backends.set_mat_mul_precision("highest")


def _printable(text: str) -> str:
    # Random weights write control characters, which terminals would obey.
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _print_summary(result: GenerationResult, device: str) -> None:
    prefill_tokens = sum(s.num_tokens - s.num_generated for s in result.steps)
    print(f"\n{len(result.generated)} prompts on {device}, {len(result.steps)} steps")
    print(f"prompt tokens         {prefill_tokens + len(result.generated)}")
    print(f"generated tokens      {result.num_generated}")
    print(f"tokens per second     {result.tokens_per_second:.1f}")
    print(f"  compiled steps only {result.compiled_tokens_per_second:.1f}")
    print(f"compilations          {result.num_compilations}")


def _check(
    args: argparse.Namespace,
    prompts: Sequence[Sequence[int]],
    result: GenerationResult,
    eos_token_ids: Sequence[int],
) -> int:
    reference = models.load_model(args.model, "eager", torch.float32)
    expected = [
        check.reference_generate(
            reference,
            prompt,
            max_new_tokens=args.max_new_tokens,
            eos_token_ids=eos_token_ids,
        )
        for prompt in tqdm(prompts, unit="prompt", desc="checking")
    ]
    difference = check.first_difference(result.generated, expected)
    if difference is not None:
        print(f"check FAILED: {difference}", file=sys.stderr)
        return 1
    print(f"check passed: {result.num_generated} tokens equal the model's own generate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
