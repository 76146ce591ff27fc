"""How often a model that reads an 8-bit cache says the same as with bfloat16.

    python -m benchmarks.quantised_caches
    python -m benchmarks.quantised_caches --update torch_rpa/transformers/README.md

The built-in model, in bfloat16 on CPU tensors, reads pieces of text that it was not
trained on, and goes on greedily. With each cache it is compared with itself with a
cache in bfloat16: the most likely token after each token that it reads, and the texts
that it writes. Scales are measured with text that it was trained on: one for the model,
one for each layer, or one for each key head of each layer.

Nothing here is random. One more row has the model in float32, weights and cache: so
often does bfloat16 itself say something else.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from benchmarks import command_line, environment

if TYPE_CHECKING:
    import torch

    from torch_rpa.layer_scales import LayerScales

MARK = "<!-- measured quantised caches -->"
LABEL = "Agreement of tokens of the built-in model, MEASURED on a CPU"
CACHE_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
HEADER = (
    "| cache | scales of | k_scale, v_scale | same token after a given text | "
    "same text written |",
    "|---|---|---|---|---|",
)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says of some pieces of text.

    Attributes:
        next_tokens: The most likely token after each token of each piece but its last.
        texts: What it writes after each piece.
    """

    next_tokens: list[list[int]]
    texts: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How many answers are the same, of how many."""

    same_tokens: int
    tokens: int
    same_texts: int
    texts: int

    def __str__(self) -> str:
        share = 100 * self.same_tokens / self.tokens
        return f"{share:.1f} % | {self.same_texts} of {self.texts}"


def agreement(answers: Answers, others: Answers) -> Agreement:
    """Compares the answers to the same pieces."""
    pairs = [
        pair
        for rows in zip(answers.next_tokens, others.next_tokens, strict=True)
        for pair in zip(*rows, strict=True)
    ]
    texts = list(zip(answers.texts, others.texts, strict=True))
    return Agreement(
        sum(one == other for one, other in pairs),
        len(pairs),
        sum(one == other for one, other in texts),
        len(texts),
    )


def pieces(texts: Sequence[str], count: int, num_bytes: int) -> list[list[int]]:
    """Returns token ids of pieces of the texts, evenly spread over all of them.

    Raises:
        ValueError: They would overlap.
    """
    from torch_rpa.generate.tokenizer import ByteTokenizer

    text = "\n".join(texts).encode("ascii", "ignore").decode()
    if len(text) < count * num_bytes:
        raise ValueError(
            f"pieces: expected at most {len(text) // num_bytes} of {num_bytes} bytes, "
            f"got {count}"
        )
    stride = len(text) // count
    encode = ByteTokenizer().encode
    return [encode(text[i * stride : i * stride + num_bytes]) for i in range(count)]


def ask(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    dtype: torch.dtype,
    **cache_options: Any,
) -> Answers:
    """Has the built-in model read the prompts, and go on.

    Args:
        prompts: Token ids.
        new_tokens: So many it writes after each.
        dtype: Of the model.
        cache_options: ``cache_dtype``, ``k_scale`` and ``v_scale`` of the engine.
    """
    from torch_rpa.generate.models import load_model
    from torch_rpa.serving import Engine, EngineOptions, SamplingParams

    options = EngineOptions(device="cpu", prefix_caching=False, **cache_options)
    engine = Engine(load_model(None, "rpa", dtype), options)
    params = SamplingParams(
        max_new_tokens=new_tokens, eos_token_ids=(), prompt_logprobs=1
    )
    outputs = engine.generate_batch([list(p) for p in prompts], params).values()
    next_tokens = [
        [
            next(token for token, found in entries.items() if found.rank == 1)
            for entries in output.prompt_logprobs or []
            if entries is not None
        ]
        for output in outputs
    ]
    return Answers(next_tokens, [output.generated_tokens for output in outputs])


def rows(num_pieces: int, piece_bytes: int, new_tokens: int) -> list[str]:
    """Returns the lines of the table, without its header."""
    import torch

    import torch_rpa
    from torch_rpa.generate.byte_llama.corpus import load_split
    from torch_rpa.generate.models import load_model
    from torch_rpa.scales import Granularity

    split = load_split()
    prompts = pieces([d.text for d in split.held_out], num_pieces, piece_bytes)
    known = pieces([d.text for d in split.training], num_pieces, piece_bytes)
    expected = ask(prompts, new_tokens, dtype=torch.bfloat16)
    model = load_model(None, "rpa", torch.bfloat16)
    lines = []
    for name in CACHE_DTYPES:
        dtype = getattr(torch, name)
        kinds = {
            granularity: torch_rpa.measure_kv_scales(
                model, known, dtype=dtype, granularity=granularity
            )
            for granularity in get_args(Granularity)
        }
        for kind, scales in (kinds | {"1": torch_rpa.KVScales(1.0, 1.0)}).items():
            answers = ask(
                prompts,
                new_tokens,
                dtype=torch.bfloat16,
                cache_dtype=dtype,
                **scales._asdict(),
            )
            numbers = ", ".join(map(_range, scales))
            cells = name, kind, numbers, str(agreement(answers, expected))
            lines.append(f"| {' | '.join(cells)} |")
    in_float32 = ask(prompts, new_tokens, dtype=torch.float32)
    lines.append(f"| the model in float32 | | | {agreement(in_float32, expected)} |")
    return lines


def _range(scales: LayerScales) -> str:
    import torch

    least, largest = (f"{x:.3g}" for x in torch.as_tensor(scales).aminmax())
    return least if least == largest else f"{least} to {largest}"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, low, high in (("pieces", 1, 256), ("bytes", 2, 256), ("new", 1, 128)):
        if not low <= getattr(options, name) <= high:
            parser.error(
                f"--{name}: expected {low} to {high}, got {getattr(options, name)}"
            )
    command_line.check_update(parser, options.update, MARK)
    import torch

    torch.set_num_threads(options.threads)
    described = environment.describe("host CPU")
    described["transformers"] = importlib.metadata.version("transformers")
    lines = [*HEADER, *rows(options.pieces, options.bytes, options.new)]
    environment.print_header(LABEL, described)
    print("\n".join(lines))
    if options.update:
        names = ("commit", "torch", "transformers")
        versions = ", ".join(f"{name} {described[name]}" for name in names)
        sizes = (
            f"{options.pieces} pieces of {options.bytes} bytes, {options.new} tokens "
            "written after each"
        )
        lines = [f"{versions}. {LABEL}: {sizes}.", "", *lines]
        environment.update_markdown(options.update, MARK, lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised_caches",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    parser.add_argument("--pieces", type=int, default=128, help="of text")
    parser.add_argument("--bytes", type=int, default=192, help="of each piece")
    parser.add_argument("--new", type=int, default=48, help="tokens after each piece")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument(
        "--update", metavar="FILE", help=f"write the table between two lines {MARK}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
