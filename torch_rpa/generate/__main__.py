"""Command line: ``python -m torch_rpa.generate --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from torch_rpa import devices
from torch_rpa.generate import check, models, report
from torch_rpa.generate.console import StreamPrinter, printable
from torch_rpa.generate.tokenizer import PromptEncoder, Tokenizer
from torch_rpa.generate.workload import (
    TRACE_FORMAT,
    TimedRequest,
    Workload,
    prompts_workload,
    read_trace,
    replay,
)
from torch_rpa.kv_cache import CACHE_DTYPES
from torch_rpa.serving import (
    Engine,
    EngineOptions,
    GenerationOutput,
    SamplingParams,
    StepRecord,
)
from torch_rpa.transformers import ATTENTION_NAME

DEFAULT_PROMPTS = (
    "Once upon a time",
    "def attention(q, k, v):",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "1, 1, 2, 3, 5, 8,",
)
MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_DTYPES_BY_NAME = {str(d).removeprefix("torch."): d for d in CACHE_DTYPES}
# All prompts run at once up to so many, and up to so many tokens in one step.
USUAL_SEQUENCES, USUAL_STEP_TOKENS = 16, 256
USUAL_NEW_TOKENS = 48
# Padded sizes of a step are multiples of this.
ALIGNMENT = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.check and (args.dtype, args.cache_dtype or args.dtype) != ("float32",) * 2:
        parser.error("--check compares in float32: drop --dtype and --cache-dtype")
    if args.check and (args.temperature or args.stop):
        parser.error("--check compares greedy texts: drop --temperature and --stop")
    if args.trace and (args.prompt or args.prompt_file):
        parser.error("--trace has prompts of its own: drop --prompt and --prompt-file")
    if args.trace and args.stream:
        parser.error("--trace prints no texts: drop --stream")
    try:
        return _run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_rpa.generate",
        description="Generate for many prompts at once with ragged paged attention.",
        epilog=TRACE_FORMAT,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a model saved by transformers, with its tokenizer; without it the small "
        "built-in one",
    )
    parser.add_argument(
        "--device",
        choices=devices.names(),
        default=devices.usual_name(),
        help="of the model; the CPU is a device without any framework",
    )
    parser.add_argument("--dtype", choices=MODEL_DTYPES, default="float32")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every token with the model's own generate (eager attention, "
        "float32, CPU) and fail on the first difference",
    )
    _add_prompt_arguments(parser.add_argument_group("prompts"))
    _add_sampling_arguments(parser.add_argument_group("sampling"))
    _add_engine_arguments(parser.add_argument_group("engine"))
    return parser


def _add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"may be repeated; without any {len(DEFAULT_PROMPTS)} built-in prompts",
    )
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt on each line; - is standard input",
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="replay requests with their arrival times; see below",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is what a user says: write it with the chat template of the "
        "tokenizer",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="print texts as they grow: one as it comes, several line by line",
    )
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw sequences, tokens and pages of the steps over time (PNG, PDF, SVG); "
        "needs matplotlib",
    )


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.description = (
        "Without an option, what the generation config of the model says. --check is "
        "greedy and takes the end tokens alone from there."
    )
    group.add_argument(
        "--max-new-tokens",
        type=_positive,
        help=f"without it and in no generation config {USUAL_NEW_TOKENS}",
    )
    group.add_argument(
        "--temperature", type=float, help="0 takes the most likely token"
    )
    group.add_argument("--top-k", type=int, help="0 is all tokens")
    group.add_argument("--top-p", type=float, help="1 is all tokens")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends a text; may be repeated"
    )


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    defaults = EngineOptions()
    group.add_argument(
        "--max-num-sequences",
        type=_positive,
        help=f"at once; without it all prompts, up to {USUAL_SEQUENCES}",
    )
    group.add_argument(
        "--max-tokens-per-step",
        type=_positive,
        help="cut prefills into several steps; without it "
        f"{USUAL_STEP_TOKENS}, or fewer for short prompts",
    )
    group.add_argument(
        "--page-size", type=_positive, default=defaults.page_size, help="tokens"
    )
    group.add_argument(
        "--num-pages",
        type=_positive,
        help="without it enough for --max-num-sequences of the longest",
    )
    group.add_argument(
        "--no-prefix-caching", dest="prefix_caching", action="store_false"
    )
    group.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES_BY_NAME, help="without it --dtype"
    )


class _HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows defaults, and the trace format as it is."""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _run(args: argparse.Namespace) -> int:
    if args.plot:
        report.require_matplotlib()
    device = devices.open_device(args.device)
    if args.check:
        devices.multiply_in_float32(device)
    tokenizer = models.load_tokenizer(args.model)
    model = models.load_model(args.model, ATTENTION_NAME, MODEL_DTYPES[args.dtype])
    workload = _workload(args, tokenizer, model)
    steps: list[StepRecord] = []
    engine = Engine(
        model,
        _engine_options(args, workload),
        tokenizer=tokenizer,
        on_step=steps.append,
    )
    if args.trace:  # compiling would delay the first requests
        sampled = (r.params.temperature > 0 for r in workload.requests)
        engine.warm_up(with_sampling=any(sampled))
    results = _generate(args, engine, workload, tokenizer)
    if not args.trace and not args.stream:
        for request, output in results:
            print(f"--- {request.name}")
            print(printable(tokenizer.decode(output.generated_tokens, True)))
    outputs = [output for _, output in results]
    print(f"\n{report.summary(engine, outputs, args.device)}")
    if args.plot:
        report.plot(steps, engine.scheduler.allocator.num_pages, args.plot)
    failed = [(r.name, o.error) for r, o in results if o.error is not None]
    for name, error in failed:
        print(f"error: {name!r}: {error}", file=sys.stderr)
    if failed:
        return 2
    if not args.check:
        return 0
    del model, engine
    return _check(args, results)


def _workload(
    args: argparse.Namespace, tokenizer: Tokenizer, model: PreTrainedModel
) -> Workload:
    params = _sampling_params(args, model)
    encoder = PromptEncoder(tokenizer, as_chat=args.chat)
    if args.trace:
        vocabulary = model.config.get_text_config().vocab_size
        return read_trace(args.trace, encoder, params, vocabulary)
    texts = [*(args.prompt or ())]
    if args.prompt_file:
        if str(args.prompt_file) == "-":
            text = sys.stdin.read()
        else:
            text = args.prompt_file.read_text(encoding="utf-8")
        texts += [line for line in text.splitlines() if line]
        if not texts:
            raise ValueError(f"--prompt-file must hold a prompt, got {text!r}")
    return prompts_workload(texts or DEFAULT_PROMPTS, encoder, params)


def _sampling_params(
    args: argparse.Namespace, model: PreTrainedModel
) -> SamplingParams:
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    given = {name: getattr(args, name) for name in names}
    changes = {name: value for name, value in given.items() if value is not None}
    changes["seed"] = args.seed
    if args.stop:
        changes["stop_strings"] = args.stop
    if args.check:
        ends = models.eos_token_ids(model)
        number = {"max_new_tokens": USUAL_NEW_TOKENS, "eos_token_ids": ends}
        return SamplingParams(**{**number, **changes})
    return models.sampling_params(model, usual_new_tokens=USUAL_NEW_TOKENS, **changes)


def _engine_options(args: argparse.Namespace, workload: Workload) -> EngineOptions:
    requests = workload.requests
    step_tokens = args.max_tokens_per_step or min(
        USUAL_STEP_TOKENS, sum(len(request.prompt_ids) for request in requests)
    )
    num_sequences = args.max_num_sequences or min(
        len(requests), step_tokens, USUAL_SEQUENCES
    )
    # Prompts that start together have two sizes of steps: with prompts, and decode. A
    # trace has all sizes.
    buckets = {-(-n // ALIGNMENT) * ALIGNMENT for n in (num_sequences, step_tokens)}
    return EngineOptions(
        max_num_sequences=num_sequences,
        max_tokens_per_step=step_tokens,
        max_sequence_length=max(
            len(request.prompt_ids) + request.params.max_new_tokens
            for request in requests
        ),
        page_size=args.page_size,
        num_pages=args.num_pages,
        token_buckets=None if args.trace else tuple(sorted(buckets)),
        cache_dtype=CACHE_DTYPES_BY_NAME.get(args.cache_dtype),
        prefix_caching=args.prefix_caching,
        device=args.device,
    )


def _generate(
    args: argparse.Namespace, engine: Engine, workload: Workload, tokenizer: Tokenizer
) -> list[tuple[TimedRequest, GenerationOutput]]:
    """Runs all requests; returns them with their results, in order of arrival."""
    requests: dict[str, TimedRequest] = {}
    outputs: dict[str, GenerationOutput] = {}
    num_requests = len(workload.requests)
    printer = None
    if args.stream:
        printer = StreamPrinter(tokenizer, sys.stdout, num_texts=num_requests)

    def on_add(request_id: str, request: TimedRequest) -> None:
        requests[request_id] = request
        if printer:
            printer.add(request_id, request.name)

    total = sum(request.params.max_new_tokens for request in workload.requests)
    with tqdm(
        total=total, unit="token", desc="generating", disable=args.stream
    ) as progress:
        for update in replay(engine, workload, on_add):
            progress.update(len(update.new_tokens))
            outputs[update.request_id] = update.output
            if printer:
                printer.update(update)
    return [(request, outputs[name]) for name, request in requests.items()]


def _check(
    args: argparse.Namespace, results: Sequence[tuple[TimedRequest, GenerationOutput]]
) -> int:
    reference = models.load_model(args.model, "eager", torch.float32)
    expected = [
        check.reference_generate(
            reference,
            request.prompt_ids,
            max_new_tokens=request.params.max_new_tokens,
            eos_token_ids=models.token_ids(request.params.eos_token_ids),
        )
        for request, _ in tqdm(results, unit="prompt", desc="checking")
    ]
    generated = [output.generated_tokens for _, output in results]
    difference = check.first_difference(generated, expected)
    if difference is not None:
        print(f"check FAILED: {difference}", file=sys.stderr)
        return 1
    num_tokens = sum(map(len, generated))
    print(f"check passed: {num_tokens} tokens equal the model's own generate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
