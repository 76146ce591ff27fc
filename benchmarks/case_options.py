"""Command-line options that choose cases, for every command that takes them."""

from __future__ import annotations

import argparse

from benchmarks import cases
from jax_kernels.contract.cache import CACHE_DTYPES
from jax_kernels.contract.options import PROBABILITIES_DTYPES


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose cases; ``selected_cases`` reads them."""
    choice = parser.add_argument_group("which steps")
    choice.add_argument(
        "--case",
        nargs="+",
        metavar="NAME",
        help="steps by name; benchmarks.predict --list has the names",
    )
    choice.add_argument(
        "--table",
        action=_Tables,
        nargs="*",
        choices=cases.TABLES,
        help="tables of cases, by default the main one",
    )
    choice.add_argument(
        "--seqs",
        metavar="LENGTHS",
        help="any step: [count*]q_len/kv_len,... with kv_len including the new tokens",
    )
    shape = parser.add_argument_group("shape of a step given by --seqs")
    add_model_arguments(shape)
    shape.add_argument(
        "--no-causal", action="store_true", help="queries see later keys as well"
    )
    shape.add_argument(
        "--chunk", type=int, help="chunk_prefill_size; by default no such phase"
    )
    shape.add_argument(
        "--decode-q-len", type=int, help="most new tokens of a decode; by default 1"
    )
    shape.add_argument(
        "--q-scale", type=float, help="quantises queries; by default they are not"
    )
    shape.add_argument(
        "--probabilities-dtype",
        choices=PROBABILITIES_DTYPES,
        help="to which those of prefill may be rounded; by default they are not",
    )
    shape.add_argument("--num-tokens", type=int, help="T; by default just enough")
    shape.add_argument("--num-sequences", type=int, help="S; by default just enough")
    shape.add_argument("--pages-per-sequence", type=int, help="P; likewise")


class _Tables(argparse.Action):
    """Names of tables; without any, the main one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values or ["main"])


def add_model_arguments(shape: argparse._ArgumentGroup) -> None:
    """Adds heads, masks, dtypes and page size; ``given_model`` reads the first two."""
    shape.add_argument("--heads", type=int, default=32, help="query heads")
    shape.add_argument("--kv-heads", type=int, default=8, help="key heads")
    shape.add_argument("--head-dim", type=int, default=128, help="width of a head")
    shape.add_argument("--window", type=int, help="sliding window; by default none")
    shape.add_argument("--soft-cap", type=float, help="of scores; by default none")
    shape.add_argument("--sinks", action="store_true", help="an extra key of each head")
    shape.add_argument(
        "--q-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of queries and of new keys and values",
    )
    shape.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, default="bfloat16", help="of the cache"
    )
    shape.add_argument("--page-size", type=int, default=128, help="tokens of a page")


def given_model(options: argparse.Namespace) -> cases.Model:
    """The model that the options of ``add_model_arguments`` mean."""
    return cases.Model(
        options.heads,
        options.kv_heads,
        options.head_dim,
        sliding_window=options.window,
        soft_cap=options.soft_cap,
        with_sinks=options.sinks,
    )


def selected_cases(options: argparse.Namespace) -> list[cases.Case]:
    """The cases that the options of ``add_case_arguments`` mean."""
    if options.case:
        return cases.select(options.case)
    if options.table:
        members = (case for name in options.table for case in cases.TABLES[name])
        return list({case.name: case for case in members}.values())
    case = cases.fitted(
        "custom",
        given_model(options),
        options.seqs,
        page_size=options.page_size,
        q_dtype=options.q_dtype,
        cache_dtype=options.cache_dtype,
        causal=not options.no_causal,
        chunk_prefill_size=options.chunk,
        decode_q_len=options.decode_q_len,
        q_scale=options.q_scale,
        probabilities_dtype=options.probabilities_dtype,
        num_tokens=options.num_tokens,
        num_sequences=options.num_sequences,
        pages_per_sequence=options.pages_per_sequence,
    )
    return [case]
