"""The options of the command line, read before torch is imported."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_kernels.contract.cache import CACHE_DTYPES, check_page_size
from jax_kernels.contract.options import FACTOR_RANGE, is_factor
from torch_rpa import bridges
from torch_rpa.generate.constants import (
    DEFAULT_PROMPTS,
    MODEL_DTYPES,
    USUAL_NEW_TOKENS,
    USUAL_SEQUENCES,
    USUAL_STEP_TOKENS,
)
from torch_rpa.generate.trace import TRACE_FORMAT

# Of parameters and options whose rooms take long to import.
DEFAULT_PAGE_SIZE, LEAST_TEMPERATURE, LARGEST = 16, 1e-5, 2**31 - 1
MOST_LOGPROBS = 20
# What can make a text another one than the model's own greedy text, and what of it does
# not.
_NEUTRAL = {
    "temperature": 0,
    "n": 1,
    "min_tokens": 0,
    "stop": None,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "json": None,
    "regex": None,
    "choice": None,
}
# What messages call by the name of a parameter, and the command line otherwise.
_OTHER_NAMES = {
    "max_sequence_length": "prompt tokens and --max-new-tokens together",
    "prompt_ids": "prompt",
    "stop_strings": "--stop",
    "structured_outputs.json": "--json",
    "structured_outputs.regex": "--regex",
    "structured_outputs.choice": "--choice",
    "structured_outputs": "--json, --regex or --choice",
}


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Reads the command line; a mistake ends the program."""
    args = parser.parse_args(argv)
    if args.check and (args.dtype, args.cache_dtype or args.dtype) != ("float32",) * 2:
        parser.error("--check compares in float32: drop --dtype and --cache-dtype")
    changes = [
        name
        for name, neutral in _NEUTRAL.items()
        if getattr(args, name) not in (None, neutral)
    ]
    if args.check and changes:
        options = " and ".join("--" + name.replace("_", "-") for name in changes)
        parser.error(f"--check compares the model's own greedy texts: drop {options}")
    if args.trace and (args.prompt or args.prompt_file):
        parser.error("--trace has prompts of its own: drop --prompt and --prompt-file")
    if args.trace and (args.stream or args.logprobs is not None):
        parser.error("--trace prints no texts: drop --stream and --logprobs")
    if args.stream and args.logprobs is not None:
        parser.error("--logprobs are printed after a text: drop --stream")
    if args.kv_scales and not args.k_scale is args.v_scale is None:
        parser.error("--kv-scales has both scales: drop --k-scale and --v-scale")
    num_sequences, num_tokens = args.max_num_sequences, args.max_tokens_per_step
    if num_sequences and num_tokens and num_tokens < num_sequences:
        parser.error(
            "--max-tokens-per-step must be at least one for each of the "
            f"{num_sequences} of --max-num-sequences, got {num_tokens}"
        )
    return args


def option_names(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Callable[[str], str]:
    """Returns a function that calls options in a message as the command line does."""
    options = {
        action.dest: action.option_strings[0]
        for action in parser._actions
        if action.option_strings
    }
    options |= _OTHER_NAMES
    if args.kv_scales:  # what k_scale and v_scale are then comes from there
        del options["k_scale"], options["v_scale"]
    # Long names first, as one may begin with another.
    names = sorted(map(re.escape, options), key=len, reverse=True)
    # Names of one word may be words of a sentence, unless they begin it.
    several = "|".join(name for name in names if "_" in name)
    pattern = re.compile(rf"\b({several})\b|^({'|'.join(names)})(?= must)")
    return lambda message: pattern.sub(lambda m: options[m[0]], message)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
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
        choices=(*bridges.BRIDGES, "cpu"),
        help="of the model; the CPU is a device without any framework. Without it the "
        "first that can be used",
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
    _add_structure_arguments(parser.add_argument_group("structured outputs"))
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
        "--temperature", type=_temperature, help="0 takes the most likely token"
    )
    group.add_argument("--top-k", type=_top_k, help="0 is all tokens")
    group.add_argument("--top-p", type=_top_p, help="1 is all tokens")
    group.add_argument(
        "--min-p",
        type=_min_p,
        help="tokens at least so many times as likely as the most likely one; 0 is all",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--n", type=_positive, help="texts for each prompt; needs a temperature"
    )
    group.add_argument(
        "--repetition-penalty",
        type=_repetition_penalty,
        help="more than 1 makes tokens of the prompt and the text less likely",
    )
    for name, unit in (("presence", "once"), ("frequency", "each time")):
        group.add_argument(
            f"--{name}-penalty",
            type=_penalty,
            help=f"subtracted {unit} from the logits of tokens of the text, -2 to 2",
        )
    group.add_argument(
        "--min-tokens",
        type=_number(int, lambda n: 0 <= n <= LARGEST, "an int of at least 0"),
        help="a text does not end before so many",
    )
    group.add_argument(
        "--stop",
        action="append",
        type=_text,
        metavar="TEXT",
        help="ends a text; may be repeated",
    )
    group.add_argument(
        "--logprobs",
        type=_logprobs,
        help="print the log probability of each token, and so many most likely "
        f"tokens at each position, 0 to {MOST_LOGPROBS}",
    )


def _add_structure_arguments(group: argparse._ArgumentGroup) -> None:
    group.description = (
        "What a text must be like: one of the three. Needs llguidance, which the extra "
        "structured installs."
    )
    group = group.add_mutually_exclusive_group()
    group.add_argument(
        "--json",
        type=_json_schema,
        metavar="SCHEMA",
        help="JSON that follows this JSON schema",
    )
    group.add_argument(
        "--regex",
        type=_text,
        metavar="EXPRESSION",
        help="what this regular expression matches as a whole",
    )
    group.add_argument(
        "--choice",
        action="append",
        type=_text,
        metavar="TEXT",
        help="this text; repeated, one of the texts",
    )


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
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
        "--page-size", type=_page_size, default=DEFAULT_PAGE_SIZE, help="tokens"
    )
    group.add_argument(
        "--num-pages",
        type=_positive,
        help="without it enough for --max-num-sequences of the longest",
    )
    group.add_argument(
        "--no-prefix-caching", dest="prefix_caching", action="store_false"
    )
    group.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="without it --dtype")
    for name, stored in (("k", "keys"), ("v", "values")):
        group.add_argument(
            f"--{name}-scale",
            type=_scale,
            help=f"what {stored} are divided by before the cache stores them, which "
            "int8 needs; without it 1",
        )
    group.add_argument(
        "--kv-scales",
        type=Path,
        metavar="PATH",
        help="both of these for each layer or head: a .json file that "
        "torch_rpa.KVScales.save wrote, or a folder or file of safetensors that has "
        "them, such as DIR of --model",
    )


class _HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows defaults, and the trace format as it is."""


def _number(
    kind: type[int] | type[float], is_valid: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """Returns what argparse calls with the text of a number."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not is_valid(number):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return number

    return parse


_positive = _number(
    int, lambda n: 1 <= n <= LARGEST, "an int of at least 1, below 2**31"
)
_top_k = _number(
    int, lambda n: 0 <= n <= LARGEST, "an int, 0 (all) or more, below 2**31"
)
_top_p = _number(float, lambda n: 0 < n <= 1, "more than 0 and at most 1")
_min_p = _number(float, lambda n: 0 <= n <= 1, "at least 0 and at most 1")
_repetition_penalty = _number(
    float, lambda n: 0 < n < math.inf, "more than 0 and finite"
)
_penalty = _number(float, lambda n: -2 <= n <= 2, "from -2 to 2")
_scale = _number(float, is_factor, f"a positive number {FACTOR_RANGE}")
_logprobs = _number(
    int, lambda n: 0 <= n <= MOST_LOGPROBS, f"an int from 0 to {MOST_LOGPROBS}"
)
_temperature = _number(
    float,
    lambda n: n == 0 or LEAST_TEMPERATURE <= n < math.inf,
    f"0 or at least {LEAST_TEMPERATURE}, and finite",
)


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must have one character or more, got ''")
    return text


def _json_schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a JSON schema, got {text!r}: {error}"
        ) from None
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(
            f"must be a JSON schema, which is an object, got {text!r}"
        )
    return schema


def _page_size(text: str) -> int:
    page_size = _positive(text)
    try:
        check_page_size(page_size)
    except ValueError as error:
        message = str(error).removeprefix("page_size ")
        raise argparse.ArgumentTypeError(message) from None
    return page_size
