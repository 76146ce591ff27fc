"""Runs what the command line asks for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from torch_rpa import KVScales, devices, read_kv_scales
from torch_rpa.generate import check, models, report
from torch_rpa.generate.console import StreamPrinter, printable
from torch_rpa.generate.constants import (
    DEFAULT_PROMPTS,
    USUAL_NEW_TOKENS,
    USUAL_SEQUENCES,
    USUAL_STEP_TOKENS,
)
from torch_rpa.generate.tokenizer import PromptEncoder, Tokenizer
from torch_rpa.generate.trace import Trace
from torch_rpa.generate.workload import (
    TimedRequest,
    Workload,
    prompts_workload,
    read_trace,
    replay,
    trace_workload,
)
from torch_rpa.options import torch_dtype
from torch_rpa.serving import (
    Engine,
    EngineOptions,
    GenerationOutput,
    SamplingParams,
    StepRecord,
)
from torch_rpa.serving.structured import GrammarFactory
from torch_rpa.transformers import ATTENTION_NAME

# Padded sizes of a step are multiples of this.
ALIGNMENT = 8
# Options of the command line that are parameters of requests, by the same names.
SAMPLING_OPTIONS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "n"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"),
    "logprobs",
)
# Those that say what a text must be like, at most one of which is given.
STRUCTURE_OPTIONS = ("json", "regex", "choice")
COMPILING, GENERATING = "compiling", "generating"
INTERRUPTED = 130  # as shells number what Ctrl-C ends


def run(args: argparse.Namespace, with_option_names: Callable[[str], str]) -> int:
    """Runs and prints; returns the exit code.

    Args:
        args: Of the command line.
        with_option_names: What to do with messages, which name arguments of Python.
    """
    args.device = args.device or devices.usual_name()
    try:
        if args.plot:
            report.check_plot_path(args.plot)
        trace = None
        if args.trace:
            try:
                trace = read_trace(args.trace, SamplingParams())
            except ValueError as error:  # the names are those of the trace
                _print_errors(str(error))
                return 2
        texts = None if trace else _texts(args)
        return _run(args, trace, texts, with_option_names)
    except (ValueError, NotImplementedError, OSError) as error:
        _print_errors(with_option_names(str(error)))
        return 2
    except KeyboardInterrupt:
        print("interrupted before there was a text", file=sys.stderr)
        return INTERRUPTED


def _print_errors(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)


def _run(
    args: argparse.Namespace,
    trace: Trace | None,
    texts: Sequence[str] | None,
    with_option_names: Callable[[str], str],
) -> int:
    device = devices.open_device(args.device)
    if args.check:
        devices.multiply_in_float32(device)
    tokenizer = models.load_tokenizer(args.model)
    model = models.load_model(args.model, ATTENTION_NAME, torch_dtype(args.dtype))
    workload = _workload(args, trace, texts, tokenizer, model)
    steps: list[StepRecord] = []
    engine = Engine(
        model,
        _engine_options(args, workload),
        tokenizer=tokenizer,
        on_step=steps.append,
    )
    if trace:  # compiling would delay the first requests
        wishes = [request.params for request in workload.requests]
        with tqdm(desc=COMPILING, bar_format="{desc} {elapsed}"):
            engine.warm_up(
                with_sampling=any(params.temperature > 0 for params in wishes),
                with_logits=any(params.changes_logits for params in wishes),
            )
    results, is_whole = _generate(args, engine, workload, tokenizer, steps)
    if not args.trace and not args.stream:
        for request, output in results:
            print(f"--- {_heading(request, output)}")
            print(printable(tokenizer.decode(output.generated_tokens, True)))
            if output.logprobs is not None:
                print(report.logprobs(output))
    outputs = [output for _, output in results]
    print(f"\n{report.summary(engine, outputs, args.device)}")
    if args.plot and steps:
        report.plot(steps, engine.scheduler.allocator.num_pages, args.plot)
    if not is_whole:
        ended = sum(output.is_finished() for output in outputs)
        print(
            f"interrupted: {ended} of {workload.num_texts} texts had ended",
            file=sys.stderr,
        )
        return INTERRUPTED
    failed = [(_heading(r, o), o.error) for r, o in results if o.error is not None]
    for name, error in failed:
        print(f"error: {name!r}: {with_option_names(error)}", file=sys.stderr)
    if failed:
        return 2
    if not args.check:
        return 0
    del model, engine
    return _check(args, results)


def _heading(request: TimedRequest, output: GenerationOutput) -> str:
    n = request.params.n
    return request.name if n == 1 else f"{request.name} [{output.index + 1} of {n}]"


def _texts(args: argparse.Namespace) -> Sequence[str]:
    """Returns the prompts of arguments, of a file or of standard input."""
    texts = [*(args.prompt or ())]
    if args.prompt_file:
        try:
            if str(args.prompt_file) == "-":
                text = sys.stdin.read()
            else:
                text = args.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompt-file must be text in UTF-8, got {args.prompt_file}: {error}"
            ) from error
        texts += [line for line in text.splitlines() if line]
        if not texts:
            raise ValueError(f"--prompt-file must hold a prompt, got {text!r}")
    return texts or DEFAULT_PROMPTS


def _workload(
    args: argparse.Namespace,
    trace: Trace | None,
    texts: Sequence[str] | None,
    tokenizer: Tokenizer,
    model: PreTrainedModel,
) -> Workload:
    params = _sampling_params(args, model)
    vocabulary = model.config.get_text_config().vocab_size
    structure: Any = params.structured_outputs  # no dict by now
    if structure is not None:  # a mistake there is known at once
        ends = models.eos_token_ids(model)
        GrammarFactory(tokenizer, vocabulary, ends).grammar(structure)
    encoder = PromptEncoder(tokenizer, as_chat=args.chat)
    if trace:
        return trace_workload(trace, encoder, params, vocabulary)
    return prompts_workload(texts or (), encoder, params)


def _sampling_params(
    args: argparse.Namespace, model: PreTrainedModel
) -> SamplingParams:
    given = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.stop:
        changes["stop_strings"] = args.stop
    for name in STRUCTURE_OPTIONS:
        if getattr(args, name) is not None:
            changes["structured_outputs"] = {name: getattr(args, name)}
    if args.check:
        ends = models.eos_token_ids(model)
        number = {"max_new_tokens": USUAL_NEW_TOKENS, "eos_token_ids": ends}
        return SamplingParams(**{**number, **changes})
    return models.sampling_params(model, usual_new_tokens=USUAL_NEW_TOKENS, **changes)


def _engine_options(args: argparse.Namespace, workload: Workload) -> EngineOptions:
    requests = workload.requests
    # Further texts of a prompt share its pages, and compute its last token alone.
    most_tokens = sum(len(request.prompt_ids) for request in requests)
    most_tokens += workload.num_texts - len(requests)
    step_tokens = args.max_tokens_per_step or max(
        min(USUAL_STEP_TOKENS, most_tokens),
        args.max_num_sequences or 0,
    )
    num_sequences = args.max_num_sequences or min(
        workload.num_texts, step_tokens, USUAL_SEQUENCES
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
        cache_dtype=args.cache_dtype and torch_dtype(args.cache_dtype),
        **_kv_scales(args),
        prefix_caching=args.prefix_caching,
        device=args.device,
    )


def _kv_scales(args: argparse.Namespace) -> dict[str, Any]:
    path = args.kv_scales
    if path is None:
        return {"k_scale": args.k_scale, "v_scale": args.v_scale}
    read = KVScales.load if path.suffix == ".json" else read_kv_scales
    try:
        return read(path)._asdict()
    except ValueError as error:
        raise ValueError(f"--kv-scales: {error}") from error


def _generate(
    args: argparse.Namespace,
    engine: Engine,
    workload: Workload,
    tokenizer: Tokenizer,
    steps: Sequence[StepRecord],
) -> tuple[list[tuple[TimedRequest, GenerationOutput]], bool]:
    """Runs all requests; returns them with their results, in order of arrival.

    Beside them, whether it came to its end: Ctrl-C leaves those that have a token, with
    the text so far.
    """
    requests: dict[str, TimedRequest] = {}
    outputs: dict[str, GenerationOutput] = {}
    printer = None
    if args.stream:
        printer = StreamPrinter(tokenizer, sys.stdout, num_texts=workload.num_texts)

    def on_add(request_id: str, request: TimedRequest) -> None:
        requests[request_id] = request
        if printer:
            printer.add(request_id, request.name)

    total = sum(r.params.n * r.params.max_new_tokens for r in workload.requests)
    first = COMPILING if engine.stats.max_compilations else GENERATING
    is_whole = True
    with tqdm(total=total, unit="token", desc=first, disable=args.stream) as progress:
        try:
            for update in replay(engine, workload, on_add):
                is_compiling = bool(steps) and steps[-1].num_compilations > 0
                progress.set_description(
                    COMPILING if is_compiling else GENERATING, refresh=False
                )
                progress.update(len(update.new_tokens))
                outputs[update.request_id] = update.output
                if printer:
                    printer.update(update)
        except KeyboardInterrupt:
            is_whole = False
            if printer:
                printer.close()
    known = [(requests[name], outputs[name]) for name in requests if name in outputs]
    return known, is_whole


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
