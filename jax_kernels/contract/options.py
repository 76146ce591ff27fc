"""The parameters of a call that are not arrays, and the rules of their values.

This is the list of them. The schemas of the PyTorch operators are made from it, and
``tests/torch_rpa/test_signatures.py`` holds the documented functions to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

INPUT_DTYPES = ("bfloat16", "float32")
# Those of probabilities that are narrower than the values' need.
PROBABILITIES_DTYPES = ("float8_e4m3fn",)

# Which keys queries see, of those that masks leave.
Attend = Literal["all", "cache", "new"]

# Factors and their inverses must be normal float32 numbers, also after the few powers
# of two that the kernel may add to them (numerics.py).
LARGEST_FACTOR = 2.0**120
FACTOR_RANGE = "from 2**-120 to 2**120 (about 7.5e-37 to 1.3e36)"

# The schema of a PyTorch operator holds integers of 64 bits.
LARGEST_INT = 2**63 - 1

# So many new tokens of a sequence of the decode range lie in few packed rows, and all
# their queries, with all heads of a group, fit a softmax tile of the kernel.
LARGEST_DECODE_Q_LEN = 16

_Options = TypeVar("_Options", bound="AttentionOptions")


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Everything about one attention call that is not an array.

    All values are static: a new value is a new compiled program on an XLA device.

    Attributes:
      sm_scale: Factor of the scores ``q . k``, usually ``head_dim ** -0.5``: 0,
        or from 2**-120 to 2**120 in size, negative ones included.
      causal: Hide the keys after a query's own position.
      causal_block: Hide only the keys after a query's own block of so many positions,
        counted from the start of the sequence: a query at ``p`` sees those before
        ``(p // causal_block + 1) * causal_block``. Needs ``causal``. A power of two.
        None, like 1, hides all after the query. Keys that come in a later step are
        not seen, whatever their block.
      sliding_window: Keep only the last ``sliding_window`` positions, the query's own
        included. None keeps all, and so does a window as long as the context.
      attend: Of the keys that masks leave, see "all", those that were in the "cache"
        before this step, or those that are "new" in it. What is written is the same.
        With "cache" and without an update the new tokens need no slots.
      soft_cap: Replace each score ``x`` by ``soft_cap * tanh(x / soft_cap)``.
      q_scale: With an 8-bit cache, queries are quantised as well: stored as
        ``q * float32(1 / q_scale)`` in the dtype of the cache (see ``k_scale``), and
        scores multiplied by ``q_scale``.
      k_scale: The cache stores ``k * float32(1 / k_scale)``, and scores are multiplied
        by ``k_scale``. None is 1. The inverse is computed in float64 and rounded, the
        product is in float32; it is clipped to the finite range of an 8-bit cache, then
        rounded to nearest, ties to even. The same bytes come out on every path,
        but for NaN, which stays NaN in one of its codes.
      v_scale: The cache stores ``v * float32(1 / v_scale)`` likewise, and outputs are
        multiplied by ``v_scale``. None is 1.
      update_kv_cache: Write new keys and values to the cache. False reads all from the
        cache and leaves it alone.
      chunk_prefill_size: Query tokens of each of the sequences ``[i, j)`` of the
        distribution. None treats them like the mixed ones.
      decode_q_len: Most new tokens of each of the sequences ``[0, i)`` of the
        distribution, from 1 to 16. It changes the speed, never the meaning.
      probabilities_dtype: Name of the dtype to which probabilities may be rounded
        before they meet the values: float8_e4m3fn, with a cache of that dtype, or
        None, which keeps at least bfloat16. It is used in prefill where it is faster.
      out_dtype: Name of the dtype of the output, bfloat16 or float32. None is that of
        the queries.
      return_lse: Return the logarithm of the denominator of each query and head, too.
      batch_invariant: A query gets the same bits whatever else is in the batch, in
        whichever range its sequence is, however the sequence was cut into steps, and
        whatever T, S and P are. It changes rounding and speed, never the meaning.

    Raises:
      ValueError: A value breaks its rule.
      NotImplementedError: An output dtype, or a combination, that is not supported.
    """

    sm_scale: float = 1.0
    causal: bool = True
    causal_block: int | None = None
    sliding_window: int | None = None
    attend: Attend = "all"
    soft_cap: float | None = None
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    update_kv_cache: bool = True
    chunk_prefill_size: int | None = None
    decode_q_len: int = 1
    probabilities_dtype: str | None = None
    out_dtype: str | None = None
    return_lse: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sm_scale", _score_scale("sm_scale", self.sm_scale))
        for name in ("causal", "update_kv_cache", "return_lse", "batch_invariant"):
            check_bool(name, getattr(self, name))
        for name in ("sliding_window", "chunk_prefill_size"):
            _check_count(name, getattr(self, name))
        self._check_causal_block()
        _check_decode_q_len(self.decode_q_len)
        if self.attend not in get_args(Attend):
            raise ValueError(
                f"attend must be one of {', '.join(map(repr, get_args(Attend)))}, got "
                f"{self.attend!r}"
            )
        for name in ("soft_cap", "q_scale", "k_scale", "v_scale"):
            object.__setattr__(self, name, check_factor(name, getattr(self, name)))
        self._check_factor_of_scores()
        if self.probabilities_dtype not in (None, *PROBABILITIES_DTYPES):
            raise NotImplementedError(
                f"probabilities_dtype {self.probabilities_dtype} is not supported: use "
                f"{' or '.join(PROBABILITIES_DTYPES)} or None"
            )
        if self.batch_invariant:
            self._check_batch_invariant()
        if self.out_dtype is not None and self.out_dtype not in INPUT_DTYPES:
            raise NotImplementedError(
                f"out_dtype {self.out_dtype} is not supported: use bfloat16, float32 "
                "or None and cast the output"
            )

    @classmethod
    def named_in(cls: type[_Options], values: Mapping[str, Any]) -> _Options:
        """The options among the ``locals()`` of a function that has them all."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})

    def for_context(self: _Options, max_kv_len: int) -> _Options:
        """The same options without masks that hide none of ``max_kv_len`` tokens.

        They mean the same, cost less, and such numbers may not fit the integers of the
        device.
        """
        changes: dict[str, Any] = {}
        if self.sliding_window is not None and self.sliding_window >= max_kv_len:
            changes["sliding_window"] = None
        if self.causal_block is not None:
            if self.causal_block >= max_kv_len:
                changes |= {"causal": False, "causal_block": None}
            elif self.causal_block == 1:
                changes["causal_block"] = None
        return dataclasses.replace(self, **changes) if changes else self

    @property
    def needs_no_new_tokens(self) -> bool:
        """Whether keys and values of the new tokens are neither written nor read."""
        return self.attend == "cache" and not self.update_kv_cache

    @property
    def score_factor(self) -> float:
        """Factor of the products of stored queries and stored keys."""
        return self.sm_scale * (self.q_scale or 1.0) * (self.k_scale or 1.0)

    def _check_causal_block(self) -> None:
        block = self.causal_block
        _check_count("causal_block", block)
        if block is None:
            return
        if not self.causal:
            raise ValueError(
                f"causal_block must be None with causal=False, got {block}: without a "
                "causal mask queries see all blocks"
            )
        if not _is_power_of_two(block):
            raise NotImplementedError(
                f"causal_block {block} is not supported: use a power of two"
            )

    def _check_batch_invariant(self) -> None:
        if self.probabilities_dtype is not None:
            raise NotImplementedError(
                "batch_invariant is not supported with probabilities_dtype, whose sums "
                f"depend on tiles, got {self.probabilities_dtype}: leave one of them "
                "out"
            )
        if self.attend != "all":
            raise NotImplementedError(
                "batch_invariant is not supported with parts of the keys, got "
                f"attend={self.attend!r}: how a sequence was cut into steps decides "
                "what is in which part; leave one of them out"
            )

    def _check_factor_of_scores(self) -> None:
        for factor in (self.score_factor, self.score_factor / (self.soft_cap or 1.0)):
            if self.sm_scale and not is_factor(abs(factor)):
                raise ValueError(
                    "sm_scale * q_scale * k_scale, and that / soft_cap, must be "
                    f"{FACTOR_RANGE} in size, got {factor} from {self.sm_scale=}, "
                    f"{self.q_scale=}, {self.k_scale=}, {self.soft_cap=}"
                )


def check_block_sizes(value: Any) -> tuple[int, int, int] | None:
    """Returns ``(decode_block_kv, block_q, block_kv)``, or None for None.

    They change the speed of the kernel and the order of its sums, never the meaning.
    Where there is no kernel they have no effect.

    Args:
      value: Three powers of two: tokens of the cache that decode fetches at once,
        query tokens of a tile of prefill, tokens of the cache fetched at once there.

    Raises:
      ValueError: It is something else.
    """
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, Sequence) else ()
    if len(sizes) != 3 or not all(map(_is_power_of_two, sizes)):
        raise ValueError(
            "block_sizes must be three powers of two (decode_block_kv, block_q, "
            f"block_kv) or None, got {value!r}"
        )
    return sizes


def _is_power_of_two(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and value >= 1 and value.bit_count() == 1


def check_bool(name: str, value: object) -> bool:
    """Returns a flag; raises unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_factor(name: str, value: Any) -> float | None:
    """Returns a factor such as ``k_scale`` as a float, or None for None.

    Raises:
      ValueError: It is not a positive number, or too large or small for float32.
    """
    if value is None:
        return None
    if not _is_number(value) or not is_factor(value):
        raise ValueError(
            f"{name} must be a positive Python number {FACTOR_RANGE}, such that it "
            f"and its inverse are normal in float32, or None, got {value!r}"
        )
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_factor(value: Any) -> bool:
    """Whether a number and its inverse are normal in float32, with some room."""
    return 1.0 / LARGEST_FACTOR <= value <= LARGEST_FACTOR


def _score_scale(name: str, value: Any) -> float:
    if not _is_number(value) or not (value == 0 or is_factor(abs(value))):
        raise ValueError(
            f"{name} must be a Python number, 0 or {FACTOR_RANGE} in size, "
            f"got {value!r}"
        )
    return float(value)


def _check_decode_q_len(value: Any) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 1 <= value <= LARGEST_DECODE_Q_LEN:
        raise ValueError(
            f"decode_q_len must be a Python int from 1 to {LARGEST_DECODE_Q_LEN}, got "
            f"{value!r}; longer sequences belong to the other ranges of distribution"
        )


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 1 <= value <= LARGEST_INT:
        raise ValueError(
            f"{name} must be a Python int from 1 to 2**63 - 1 or None, got {value!r}"
        )
