"""Named workloads: the only list of shapes that benchmarks, tables and tests use.

A case is a compiled program (everything static) and the lengths of one step. Cases
with equal static parts share a program, as the steps of a server do.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.tpu_timing import workloads
from benchmarks.tpu_timing.workloads import Sequence
from jax_kernels.contract.cache import ITEMSIZES, check_page_size
from jax_kernels.contract.options import Attend

# After four scalars, queries, keys, values and the cache.
SINKS_OPERAND = 8
# Of a call that does not write: without keys and values.
READ_ONLY_SINKS_OPERAND = 6


@dataclasses.dataclass(frozen=True)
class Model:
    """The attention layer of a model.

    Attributes:
      num_q_heads: Hq.
      num_kv_heads: Hkv.
      head_dim: D.
      sliding_window: Positions that a query sees, or None for all.
      soft_cap: Bound of the scores, or None.
      with_sinks: Whether each head has a sink.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False


LLAMA3_8B = Model(32, 8, 128)
QWEN3 = Model(16, 8, 128)
GEMMA = Model(8, 4, 256)
GPT_OSS = Model(64, 8, 64, sliding_window=128, with_sinks=True)
MQA = Model(8, 1, 128)
# The heads of Llama, twice as wide: for comparison with published figures.
WIDE = Model(32, 8, 256)
# Heads as wide as in the layers of Gemma 4 that see the whole context.
GEMMA4_FULL = Model(32, 4, 512)


@dataclasses.dataclass(frozen=True)
class StaticShape:
    """All that the compiler knows of a call.

    Attributes:
      model: Heads and masks.
      num_tokens: T.
      num_sequences: S.
      pages_per_sequence: P.
      page_size: Tokens in a page.
      q_dtype: Of queries, keys, values and output.
      cache_dtype: Of the cache.
      causal: Whether queries see only keys up to their own position.
      chunk_prefill_size: New tokens of each sequence that is not a decode, if fixed.
      decode_q_len: Most new tokens of a sequence that counts as a decode.
      probabilities_dtype: To which those of prefill may be rounded, if given.
      q_scale: Quantises queries to the dtype of the cache, if given.
      k_scale: Of the keys in the cache.
      v_scale: Of the values in the cache.
      attend: Which keys queries see.
      update_kv_cache: Whether new tokens are written.
      return_lse: Whether the logarithms of the denominators are returned.
      batch_invariant: Whether a query gets the same bits in any batch.
    """

    model: Model
    num_tokens: int
    num_sequences: int
    pages_per_sequence: int
    page_size: int = 128
    q_dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    causal: bool = True
    chunk_prefill_size: int | None = None
    decode_q_len: int = 1
    probabilities_dtype: str | None = None
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    attend: Attend = "all"
    update_kv_cache: bool = True
    return_lse: bool = False
    batch_invariant: bool = False

    @property
    def num_pages(self) -> int:
        """Pages of a cache in which every sequence has its full length."""
        return self.num_sequences * self.pages_per_sequence

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator, in torch and in JAX."""
        return {
            "sm_scale": self.model.head_dim**-0.5,
            "causal": self.causal,
            "sliding_window": self.model.sliding_window,
            "soft_cap": self.model.soft_cap,
            "chunk_prefill_size": self.chunk_prefill_size,
            "decode_q_len": self.decode_q_len,
            "probabilities_dtype": self.probabilities_dtype,
            "q_scale": self.q_scale,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "attend": self.attend,
            "update_kv_cache": self.update_kv_cache,
            "return_lse": self.return_lse,
            "batch_invariant": self.batch_invariant,
        }

    @property
    def rpa_shape(self) -> workloads.RpaShape:
        """The sizes as the instrument wants them."""
        return workloads.RpaShape(
            max_seqs=self.num_sequences,
            pages_per_seq=self.pages_per_sequence,
            num_pages=self.num_pages,
            page_size=self.page_size,
            num_q_heads=self.model.num_q_heads,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
            q_bytes=ITEMSIZES[self.q_dtype],
            kv_bytes=ITEMSIZES[self.cache_dtype],
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
      name: Unique, as given to ``--case``.
      shape: The static part.
      lengths: As ``workloads.parse_sequences`` reads them: "128*1/8192".
    """

    name: str
    shape: StaticShape
    lengths: str

    def __post_init__(self):
        sequences, shape = self.sequences, self.shape
        check_page_size(shape.page_size)
        is_decode = [s.q_len <= shape.decode_q_len for s in sequences]
        if is_decode != sorted(is_decode, reverse=True):
            raise ValueError(
                f"sequences: expected those with up to {shape.decode_q_len} new tokens "
                f"first, got {self.lengths!r}"
            )
        tokens = sum(s.q_len for s in sequences)
        longest = max(s.kv_len for s in sequences)
        for name, need, has in (
            ("num_tokens", tokens, shape.num_tokens),
            ("num_sequences", len(sequences), shape.num_sequences),
            (
                "pages_per_sequence",
                -(-longest // shape.page_size),
                shape.pages_per_sequence,
            ),
        ):
            if need > has:
                raise ValueError(f"{name}: expected at least {need}, got {has}")

    @property
    def sequences(self) -> list[Sequence]:
        return workloads.parse_sequences(self.lengths)

    @property
    def ideal(self) -> workloads.Ideal:
        """What the step needs at least."""
        shape, sequences, causal = self.shape, self.sequences, self.shape.causal
        if shape.attend == "cache":
            # All queries see the same keys, those before the new ones.
            sequences = [Sequence(s.q_len, s.kv_len - s.q_len) for s in sequences]
            causal = False
        elif shape.attend == "new":
            sequences = [Sequence(s.q_len, s.q_len) for s in sequences]
        return workloads.ideal(
            shape.rpa_shape,
            sequences,
            causal,
            shape.model.sliding_window,
            writes_cache=shape.update_kv_cache,
        )

    @property
    def scalars(self) -> dict[int, np.ndarray]:
        """The scalar operands of the kernel, by index; sinks are the last operand."""
        operands = workloads.scalar_operands(
            self.shape.rpa_shape,
            self.sequences,
            chunked=self.shape.chunk_prefill_size is not None,
            decode_q_len=self.shape.decode_q_len,
        )
        if self.shape.model.with_sinks:
            updates = self.shape.update_kv_cache
            place = SINKS_OPERAND if updates else READ_ONLY_SINKS_OPERAND
            operands[place] = np.zeros(self.shape.model.num_q_heads, np.int32)
        return operands


def fitted(name: str, model: Model, lengths: str, **static: Any) -> Case:
    """A case whose program is no larger than its lengths need, unless told."""
    sequences = workloads.parse_sequences(lengths)
    page_size = static.get("page_size", 128)
    check_page_size(page_size)
    longest = max(s.kv_len for s in sequences)
    sizes = {
        "num_tokens": sum(s.q_len for s in sequences),
        "num_sequences": len(sequences),
        "pages_per_sequence": -(-longest // page_size),
    }
    given = {key: value for key, value in static.items() if value is not None}
    return Case(name, StaticShape(model, **{**sizes, **given}), lengths)


# A server's decode program: up to 128 sequences of up to 16K tokens.
_SERVER = {"num_tokens": 128, "num_sequences": 128, "pages_per_sequence": 128}
_FP8: dict[str, Any] = {"cache_dtype": "float8_e4m3fn"}
_MIXED = {"num_tokens": 64 + 2048, "num_sequences": 72, "pages_per_sequence": 64}
_LENGTHS = {"512": 512, "1k": 1024, "2k": 2048, "8k": 8192, "16k": 16384}
_PREFILL = {"num_tokens": 2048, "num_sequences": 8, "pages_per_sequence": 64}
_LONG_PREFILL = {**_PREFILL, "num_tokens": 8192}


def _decodes(
    prefix: str, model: Model, *contexts: str, sequences: int = 128, **static: Any
) -> list[Case]:
    return [
        fitted(
            f"{prefix}-{sequences}x{context}",
            model,
            f"{sequences}*1/{_LENGTHS[context]}",
            **_SERVER,
            **static,
        )
        for context in contexts
    ]


MAIN = (
    *_decodes("llama-decode", LLAMA3_8B, *_LENGTHS),
    *_decodes("llama-decode", LLAMA3_8B, "1k", sequences=8),
    *_decodes("llama-decode-fp8", LLAMA3_8B, "512", "1k", "2k", "8k", **_FP8),
    fitted("llama-prefill-2k-at-8k", LLAMA3_8B, "2048/8192", **_PREFILL),
    fitted("llama-prefill-8k-at-8k", LLAMA3_8B, "8192/8192", **_LONG_PREFILL),
    fitted("wide-prefill-8k-causal", WIDE, "8192/8192", **_LONG_PREFILL),
    fitted("wide-prefill-8k-full", WIDE, "8192/8192", causal=False, **_LONG_PREFILL),
    fitted("llama-mixed-64x2k-2k-at-8k", LLAMA3_8B, "64*1/2048,2048/8192", **_MIXED),
    # The parts of the mixed step, in its program.
    fitted("llama-mixed-only-64x2k", LLAMA3_8B, "64*1/2048", **_MIXED),
    fitted("llama-mixed-only-2k-at-8k", LLAMA3_8B, "2048/8192", **_MIXED),
)

_OTHER_MODELS = {
    "qwen": QWEN3,
    "gemma": GEMMA,
    "gemma4-full": GEMMA4_FULL,
    "gpt-oss": GPT_OSS,
    "mqa": MQA,
}

MODELS = tuple(
    case
    for prefix, model in _OTHER_MODELS.items()
    for case in (
        *_decodes(f"{prefix}-decode", model, "1k", "8k"),
        *_decodes(f"{prefix}-decode-fp8", model, "1k", "8k", **_FP8),
        fitted(f"{prefix}-prefill-2k-at-8k", model, "2048/8192", **_PREFILL),
    )
)

# What the cores of servers see: the heads of a model divided among chips, lengths that
# differ, drafts of several tokens, windows, short texts.
LLAMA3_70B_SHARD = MQA  # a core of eight
QWEN3_235B_SHARD = Model(16, 1, 128)  # of four
GPT_OSS_SHARD = dataclasses.replace(GPT_OSS, num_q_heads=8, num_kv_heads=1)
GPT_OSS_SHARD_FULL = dataclasses.replace(GPT_OSS_SHARD, sliding_window=None)
# The heads of most published times.
GROUPED_256 = Model(32, 4, 256)


def _lengths(sequences: Iterable[tuple[int, int]]) -> str:
    """As ``workloads.parse_sequences`` reads them."""
    return ",".join(f"{q_len}/{kv_len}" for q_len, kv_len in sequences)


def _drawn() -> dict[str, str]:
    """Lengths of mixed batches, by name; always the same."""
    rng = np.random.default_rng(0)

    def decodes(count: int) -> list[tuple[int, int]]:
        contexts = np.exp(rng.uniform(np.log(200), np.log(32768), count))
        return [(1, int(context)) for context in contexts]

    # In this order: each is drawn where the one before it ended.
    return {
        "dec256": _lengths(decodes(256)),
        "64dec": _lengths(decodes(64)),
        "fresh16": _lengths((int(n), int(n)) for n in rng.integers(300, 1501, 16)),
        "spec64x4": _lengths((4, int(n)) for n in rng.integers(2048, 8193, 64)),
    }


DRAWN = _drawn()
_SHARD_SERVER = {"num_tokens": 256, "num_sequences": 256, "pages_per_sequence": 256}
_WINDOW_SERVER = {"num_tokens": 128, "num_sequences": 128, "pages_per_sequence": 64}
_QUANTISED: dict[str, Any] = {**_FP8, "q_scale": 0.5, "k_scale": 0.5, "v_scale": 0.5}
_16K_BY_1K = ",".join(f"1024/{1024 * n}" for n in range(1, 17))


def _batches(prefix: str, model: Model, *steps: str, **static: Any) -> Iterator[Case]:
    """Steps of one program that are drawn, or "256x300": decodes at a context."""
    for step in steps:
        lengths = DRAWN.get(step) or step.replace("x", "*1/")
        dtype = "-fp8" if "cache_dtype" in static else ""
        yield fitted(f"deploy-{prefix}-{step}{dtype}", model, lengths, **static)


def _deployments() -> Iterator[Case]:
    """Steps of servers that shard models, mix lengths and check drafts."""
    shard, batch = LLAMA3_70B_SHARD, _SHARD_SERVER
    yield from _batches("8x1", shard, "dec256", "64dec", "256x300", **batch)
    yield from _batches("8x1", shard, "dec256", "64dec", **batch, **_FP8)
    yield from _batches("8x1", shard, "spec64x4", decode_q_len=4)
    yield from _batches("8x1", shard, "fresh16")
    yield from _batches("16x1", QWEN3_235B_SHARD, "dec256", **batch)
    yield from _batches("32x8", LLAMA3_8B, "spec64x4", decode_q_len=4)
    yield fitted("deploy-32x8-16-at-8k", LLAMA3_8B, "16/8192", decode_q_len=16)
    full, name = GPT_OSS_SHARD_FULL, "gpt-oss-8x1"
    contexts = [f"256x{context}" for context in (129, 300, 1000, 1024, 8100)]
    yield from _batches(name, full, "dec256", "64dec", *contexts, **batch)
    yield from _batches(name, full, "dec256", "64dec", **batch, **_FP8)
    name = f"{name}-w128"
    yield from _batches(name, GPT_OSS_SHARD, "dec256", "64dec", *contexts, **batch)
    contexts = [f"128x{context}" for context in (129, 1000, 1024, 8100, 8192)]
    yield from _batches("gpt-oss-64x8-w128", GPT_OSS, *contexts, **_WINDOW_SERVER)
    for name, lengths in (
        ("1k", "1024/1024"),
        ("8k", "8192/8192"),
        ("32k", "32768/32768"),
        ("16k-by-1k", _16K_BY_1K),
    ):
        yield fitted(f"deploy-32x4-d256-prefill-{name}", GROUPED_256, lengths)
    for heads, model in (("32x8", LLAMA3_8B), ("32x4-d256", GROUPED_256)):
        for dtype, static in (
            ("", {}),
            ("-fp8", _QUANTISED),
            ("-all-fp8", {**_QUANTISED, "probabilities_dtype": "float8_e4m3fn"}),
        ):
            name = f"deploy-{heads}-prefill-2k-at-8k{dtype}"
            yield fitted(name, model, "2048/8192", **_PREFILL, **static)


DEPLOYMENTS = tuple(_deployments())


_CASCADE_SEQUENCES = 64
_CASCADE_PREFIXES = (256, 512, 1024, 2048, 4096, 8192, 16384)
_CASCADE_REST = 512


def _parts() -> Iterator[Case]:
    """What parts of the keys cost, and the parts of a cascade beside the whole."""
    lse: dict[str, Any] = {"return_lse": True}
    for name, model, lengths, static in (
        ("decode-128x1k", LLAMA3_8B, "128*1/1024", _SERVER),
        ("decode-8x1-dec256", MQA, DRAWN["dec256"], _SHARD_SERVER),
        ("prefill-2k-at-8k", LLAMA3_8B, "2048/8192", _PREFILL),
    ):
        yield fitted(f"parts-{name}", model, lengths, **static)
        yield fitted(f"parts-{name}-lse", model, lengths, **static, **lse)
        for attend in ("cache", "new"):
            options = {**static, **lse, "attend": attend}
            yield fitted(f"parts-{name}-lse-{attend}", model, lengths, **options)
    count, longest = _CASCADE_SEQUENCES, _CASCADE_PREFIXES[-1] + _CASCADE_REST
    whole = {"pages_per_sequence": longest // 128}
    prefix = {
        **lse,
        "attend": "cache",
        "update_kv_cache": False,
        "causal": False,
        "pages_per_sequence": _CASCADE_PREFIXES[-1] // 128 + 1,
    }
    for size in _CASCADE_PREFIXES:
        yield fitted(
            f"cascade-whole-{count}x{size}+{_CASCADE_REST}",
            LLAMA3_8B,
            f"{count}*1/{size + _CASCADE_REST}",
            **whole,
        )
    for size in _CASCADE_PREFIXES:
        yield fitted(
            f"cascade-prefix-{size}", LLAMA3_8B, f"{count}/{size + count}", **prefix
        )
    yield fitted(
        f"cascade-rest-{count}x{_CASCADE_REST}",
        LLAMA3_8B,
        f"{count}*1/{_CASCADE_REST}",
        **lse,
    )


PARTS = tuple(_parts())


def _options() -> Iterator[Case]:
    """What options cost, beside the same step without them."""
    for name, model, lengths, static in (
        ("decode-128x1k", LLAMA3_8B, "128*1/1024", _SERVER),
        ("decode-8x1-dec256", MQA, DRAWN["dec256"], _SHARD_SERVER),
        ("decode-8x1-dec256-fp8", MQA, DRAWN["dec256"], {**_SHARD_SERVER, **_FP8}),
        ("prefill-2k-at-8k", LLAMA3_8B, "2048/8192", _PREFILL),
        ("prefill-8x1-fresh16", MQA, DRAWN["fresh16"], {}),
    ):
        yield fitted(f"options-{name}", model, lengths, **static)
        yield fitted(
            f"options-{name}-invariant", model, lengths, batch_invariant=True, **static
        )


OPTIONS = tuple(_options())


def _series(prefix: str, model: Model, steps: list[str], **static: Any) -> list[Case]:
    """Steps of one program, named by their lengths."""
    return [fitted(f"{prefix}:{step}", model, step, **static) for step in steps]


_FEW_TOKENS = (2, 4, 8, 16, 32, 64, 128, 256)


def _sweep() -> Iterator[Case]:
    """Grids along which ``benchmarks.sweep`` looks for cliffs, one axis at a time.

    A decode program has as many tokens as sequences: rows of padding are cleared, and
    that costs time. So there is one for each range of batch sizes.
    """
    contexts = [128, 256, 257, 512, 513, 1000, 1024, 1025, 2048, 2049, 4096, 4097]
    contexts += [8100, 8192]
    decodes = [f"{count}*1/{context}" for count in (8, 128) for context in contexts]
    fresh = [f"1*{size}/{size}" for size in (32, 64, 128, 256, 512, 1024, 2048)]
    later = [f"1*2048/{context}" for context in (4096, 6144, 8192)]
    fp8_of: dict[str, dict[str, Any]] = {"": {}, "-fp8": _FP8}
    for name, model in {"llama": LLAMA3_8B, **_OTHER_MODELS}.items():
        for suffix, fp8 in fp8_of.items():
            program = f"{name}{suffix}"
            yield from _series(program, model, decodes, **_SERVER, **fp8)
            yield from _series(program, model, fresh + later, **_PREFILL, **fp8)
            if model in (LLAMA3_8B, MQA):  # a few new tokens behind long contexts
                few = [f"8*{count}/{4096 + count}" for count in _FEW_TOKENS]
                yield from _series(program, model, few, **_PREFILL, **fp8)
    for suffix, fp8 in fp8_of.items():
        for most, counts in ((8, (4,)), (128, (16, 32, 64)), (1024, (256, 512, 1024))):
            sizes = {"num_tokens": most, "num_sequences": most}
            steps = [
                f"{count}*1/{context}"
                for count in counts
                for context in (512, 1024, 8192)
            ]
            program = f"llama{suffix}"
            pages = 128 if most == 128 else 64
            yield from _series(
                program, LLAMA3_8B, steps, pages_per_sequence=pages, **sizes, **fp8
            )
        for page_size in (16, 32, 64, 256):
            static = {**_SERVER, "pages_per_sequence": 8192 // page_size, **fp8}
            program = f"llama{suffix}-page{page_size}"
            yield from _series(
                program, LLAMA3_8B, decodes, page_size=page_size, **static
            )
    for window in (128, 256, 512, 1024, 2048):
        model = dataclasses.replace(LLAMA3_8B, sliding_window=window)
        program = f"llama-window{window}"
        yield from _series(program, model, decodes, **_SERVER)
        yield from _series(program, model, later, **_PREFILL)
    # The same steps in a program with one more phase.
    steps = ["8*1/1024", "128*1/1024"]
    yield from _series(
        "llama-chunks", LLAMA3_8B, steps, **_SERVER, chunk_prefill_size=256
    )


SWEEP = (*_sweep(), *DEPLOYMENTS)

# Steps that other kernels compute as well: see ``benchmarks.compare``.
PEERS = (
    fitted("grouped-256-prefill-2k", GROUPED_256, "2048/2048"),
    fitted("grouped-256-prefill-8k", GROUPED_256, "8192/8192"),
    *_decodes("grouped-256-decode", GROUPED_256, "16k"),
    *(
        case
        for case in MAIN
        if case.name
        in ("llama-decode-128x8k", "llama-prefill-2k-at-8k", "llama-prefill-8k-at-8k")
    ),
)

MODEL_NAMES = {"llama": LLAMA3_8B, **_OTHER_MODELS, "wide": WIDE}
# Those that block sizes are tuned for: a core's part of larger models as well.
TUNED_MODELS = {
    **MODEL_NAMES,
    "qwen-235b-shard": QWEN3_235B_SHARD,
    "gpt-oss-shard": GPT_OSS_SHARD,
    "gpt-oss-shard-full": GPT_OSS_SHARD_FULL,
}

_TUNING_CONTEXT = 16384


def _tuning_mix() -> str:
    """Decodes of all lengths up to the longest, as many of each order of size."""
    contexts = np.geomspace(200, _TUNING_CONTEXT, 64)
    return _lengths((1, int(context)) for context in contexts)


# Steps that block sizes are tuned for, of each phase, by name. Long contexts want large
# blocks, short ones and few sequences small ones; each step counts the same. Contexts
# are no multiples of pages, as most are, and where lengths differ, so do the blocks
# that suit them.
TUNING_STEPS: dict[str, dict[str, str]] = {
    "decode": {
        **{
            step: step for step in ("128*1/300", "128*1/1000", "128*1/8100", "8*1/1000")
        },
        "64 mixed": _tuning_mix(),
    },
    "prefill": {
        **{
            step: step
            for step in ("4*500/500", "1*2048/2048", "1*2048/8100", "8*16/4000")
        },
        "fresh mixed": "130/130,300/300,500/500,1000/1000",
    },
}


def tuning_shape(
    model: Model,
    *,
    page_size: int = 128,
    q_dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
) -> StaticShape:
    """The program in which all of ``TUNING_STEPS`` run."""
    return StaticShape(
        model,
        num_tokens=2048,
        num_sequences=128,
        pages_per_sequence=_TUNING_CONTEXT // page_size,
        page_size=page_size,
        q_dtype=q_dtype,
        cache_dtype=cache_dtype,
    )


TABLES = {
    "main": MAIN,
    "models": MODELS,
    "deployments": DEPLOYMENTS,
    "parts": PARTS,
    "options": OPTIONS,
    "peers": PEERS,
    "sweep": SWEEP,
}
BY_NAME = {case.name: case for cases in TABLES.values() for case in cases}


def names_in_short(members: Iterable[Case]) -> list[str]:
    """Names of cases; those of one program that differ by lengths on one line."""
    lengths: dict[str, list[str]] = {}
    for case in members:
        program, _, step = case.name.partition(":")
        lengths.setdefault(program, []).append(step)
    return [
        f"{program}:LENGTHS, {len(steps)} such as {steps[0]}" if any(steps) else program
        for program, steps in lengths.items()
    ]


def shortened(lengths: str, parts: int = 8) -> str:
    """Lengths of a case for a line of text."""
    first, *others = lengths.split(",")
    if len(others) < parts:
        return lengths
    return (
        ",".join([first, *others[: parts - 1]]) + f" and {len(others) + 1 - parts} more"
    )


def by_shape(selected: Iterable[Case]) -> dict[StaticShape, list[Case]]:
    """Cases of each program, in the order of the first of each."""
    found: dict[StaticShape, list[Case]] = {}
    for case in selected:
        found.setdefault(case.shape, []).append(case)
    return found


def in_words(members: list[Case]) -> str:
    """The cases of one program, on one line."""
    first, *others = members
    return f"{first.name} and {len(others)} more" if others else first.name


def select(names: list[str]) -> list[Case]:
    """The cases of some names.

    Raises:
      ValueError: There is no such case; the message has the names that are close.
    """
    for name in names:
        if name not in BY_NAME:
            close = difflib.get_close_matches(name, BY_NAME, n=5)
            guess = f", such as {', '.join(close)}" if close else ""
            raise ValueError(
                f"case: expected one of {len(BY_NAME)} names that python -m "
                f"benchmarks.predict --list prints{guess}; got {name!r}"
            )
    return [BY_NAME[name] for name in names]
