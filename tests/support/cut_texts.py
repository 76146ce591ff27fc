"""One text, served in steps of any size beside any neighbours, for any implementation.

What ``batch_invariant`` promises is that the outputs of the text are the same bits for
all of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Arrays of a call, with the cache, to outputs [T, Hq, D] (or more) and the new cache.
Run = Callable[[tuple[np.ndarray | None, ...]], tuple[np.ndarray, ...]]


class Step(NamedTuple):
    """How some tokens of the text are served.

    Attributes:
      q_len: How many.
      is_decode: Whether the text is first, in the decode range.
      before: (q_len, kv_len) of sequences before it.
      after: The same, after it.
    """

    q_len: int
    is_decode: bool = False
    before: Sequence[tuple[int, int]] = ()
    after: Sequence[tuple[int, int]] = ()


class Bucket(NamedTuple):
    """The static sizes of all steps."""

    num_tokens: int
    num_sequences: int
    pages_per_sequence: int


@dataclasses.dataclass(frozen=True)
class Text:
    """The numbers of a text, and of what its heads have besides."""

    queries: np.ndarray  # [L, Hq, D]
    keys: np.ndarray  # [L, Hkv, D]
    values: np.ndarray  # [L, Hkv, D]
    sinks: np.ndarray | None  # f32[Hq]
    empty_cache: Callable[[int], np.ndarray]  # of so many pages
    page_size: int


def make_text(
    length: int,
    empty_cache: Callable[[int], np.ndarray],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype,
    with_sinks: bool = True,
) -> Text:
    """A text of random numbers; the same arguments make the same text."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((length, heads, head_dim)).astype(dtype)
        for heads in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    sinks = rng.standard_normal(num_q_heads).astype(np.float32)
    return Text(q, k, v, sinks if with_sinks else None, empty_cache, page_size)


def serve(
    text: Text, steps: Sequence[Step], bucket: Bucket, run: Run, *, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Serves a text in steps.

    Neighbours have random numbers, in pages of their own; what is behind their new
    tokens in the cache is what an earlier step left there, or zeros.

    Returns:
      The outputs of the text's tokens, [L, ...] each.
    """
    rng = np.random.default_rng(seed)
    num_pages = bucket.num_sequences * bucket.pages_per_sequence
    table = rng.permutation(num_pages).astype(np.int32)
    table = table.reshape(bucket.num_sequences, bucket.pages_per_sequence)
    cache = text.empty_cache(num_pages)
    served, results = 0, []
    for step in steps:
        own = step.q_len, served + step.q_len
        assert not (step.is_decode and step.before), "decodes come first"
        lengths = [*step.before, own, *step.after]
        place = len(step.before)
        q_lens, kv_lens = (np.array(x, np.int32) for x in zip(*lengths, strict=True))
        padding = bucket.num_sequences - len(lengths)
        starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        rows = slice(starts[place], starts[place + 1])
        arrays = []
        for numbers in (text.queries, text.keys, text.values):
            shape = bucket.num_tokens, *numbers.shape[1:]
            array = rng.standard_normal(shape).astype(numbers.dtype)
            array[rows] = numbers[served : served + step.q_len]
            arrays.append(array)
        pages = np.delete(table, 0, axis=0)
        pages = np.insert(pages, place, table[0], axis=0)
        num_decodes = 1 if step.is_decode else 0
        *outputs, cache = run(
            (
                *arrays,
                cache,
                np.pad(kv_lens, (0, padding)),
                pages.reshape(-1),
                np.pad(starts, (0, padding), mode="edge"),
                np.array([num_decodes, num_decodes, len(lengths)], np.int32),
                text.sinks,
            )
        )
        results.append([np.asarray(x)[rows] for x in outputs])
        served += step.q_len
    assert served == len(text.queries)
    return tuple(np.concatenate(x) for x in zip(*results, strict=True))


def draw_steps(
    rng: np.random.Generator, length: int, bucket: Bucket, most_steps: int = 6
) -> list[Step]:
    """Random steps that serve ``length`` tokens, with random neighbours."""
    most = bucket.pages_per_sequence * 8  # tokens of a neighbour: pages have 8 at least
    cuts = rng.choice(np.arange(1, length), size=most_steps - 1, replace=False)
    steps = []
    for q_len in np.diff([0, *sorted(cuts), length]):
        room = bucket.num_tokens - q_len
        neighbours = []
        for _ in range(rng.integers(0, bucket.num_sequences)):
            other = int(rng.integers(1, 20))
            if other > room:
                break
            room -= other
            neighbours.append((other, int(rng.integers(other, most))))
        is_decode = bool(q_len == 1 and rng.integers(2))
        place = 0 if is_decode else int(rng.integers(0, len(neighbours) + 1))
        steps.append(
            Step(int(q_len), is_decode, neighbours[:place], neighbours[place:])
        )
    return steps


def differing_tokens(actual: np.ndarray, expected: np.ndarray) -> list[int]:
    """The tokens of two outputs whose bits are not the same."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.isfinite(expected.astype(np.float32)).all()
    differs = actual.view(np.uint8) != expected.view(np.uint8)
    return np.flatnonzero(differs.reshape(len(differs), -1).any(axis=1)).tolist()
